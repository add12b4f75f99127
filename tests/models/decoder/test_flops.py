import pytest

from tests.helpers import count_parameters
from trainfw.models import ModelConfig, flops_per_token


def test_matrices_are_counted_once_and_lookups_never():
    config = ModelConfig(preset="llama2-7b")
    norms, lookups = (2 * 32 + 1) * 4096, 32000 * 4096
    attention = 12 * 4096 * 32 * 2048 / 2
    assert flops_per_token(config, 2048) == 6 * (count_parameters(config) - norms - lookups) + attention


def test_tying_the_table_changes_nothing():
    tied, untied = (ModelConfig(preset="tiny", tie_embeddings=tied) for tied in (True, False))
    assert flops_per_token(tied, 128) == flops_per_token(untied, 128)


def test_a_window_counts_what_it_sees():
    full, windowed = (
        ModelConfig(preset="tiny", num_layers=1, sliding_window=4, layer_pattern=[kind])
        for kind in ("global", "sliding")
    )
    assert flops_per_token(full, 4) == flops_per_token(windowed, 4)
    saved = flops_per_token(full, 64) - flops_per_token(windowed, 64)
    assert saved == pytest.approx(12 * 64 * (64 / 2 - (4 - 4 * 4 / (2 * 64))))


def test_of_experts_those_of_a_token_are_counted():
    config = ModelConfig(preset="mixtral-8x7b")
    norms, lookups = (2 * 32 + 1) * 4096, 32000 * 4096
    attention = 12 * 4096 * 32 * 2048 / 2
    active = count_parameters(config, active=True)
    assert flops_per_token(config, 2048) == 6 * (active - norms - lookups) + attention


def test_shared_experts_are_counted_like_any_others():
    fields = {"num_experts": 8, "experts_per_token": 2}
    routed, shared = (
        ModelConfig(preset="tiny", num_layers=1, moe=fields | more) for more in ({}, {"shared_intermediate_size": 48})
    )
    assert flops_per_token(shared, 64) - flops_per_token(routed, 64) == 6 * 3 * 64 * 48
