"""Memory on one device falls as each way of sharing it says, by the analysis of the compiler that compiles the step."""

from __future__ import annotations

import jax
import pytest

from tests.helpers import tiny_recipe
from trainfw import build_program


def compiled(tmp_path, devices: int, *overrides: str):
    """(program, bytes of arguments, bytes of temporaries) on one device."""
    program = build_program(tiny_recipe(tmp_path, *overrides), jax.devices()[:devices])
    analysis = program.compile_train_step().memory_analysis()
    return program, analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def temporaries(tmp_path, devices: int, *overrides: str) -> int:
    return compiled(tmp_path, devices, *overrides)[2]


# --- What fsdp shards ----------------------------------------------------------------------------

LAYERS, WIDTH, HIDDEN, VOCABULARY, ROWS, LENGTH = 8, 128, 512, 128, 16, 8
MATRICES = LAYERS * WIDTH * (4 * WIDTH + 3 * HIDDEN) + 2 * VOCABULARY * WIDTH
LAYER = WIDTH * (4 * WIDTH + 3 * HIDDEN)
NORMS = (2 * LAYERS + 1) * WIDTH  # on every device
WEIGHTS = (
    f"model={{preset: tiny, hidden_size: {WIDTH}, intermediate_size: {HIDDEN}, num_layers: {LAYERS}, num_heads: 4, "
    f"num_kv_heads: 4, vocab_size: {VOCABULARY}, tie_embeddings: false}}",
    *(f"data.sequence_length={LENGTH}", f"train.global_batch_size={ROWS}", "train.accumulation_steps=2"),
)
"""Far more bytes of weights than of activations."""
STAGES = {"data": (0, 0, 0), "optimizer": (0, 0, 1), "gradients": (0, 1, 1), "parameters": (1, 1, 1)}
"""Whether parameters, gradients and optimizer state are shared out."""


@pytest.mark.long
def test_stages_of_zero_hold_what_their_formula_says(tmp_path):
    """Rajbhandari et al. 2019 (arXiv:1910.02054), figure 1, for Adam in f32: of M parameters on n devices

    4M + 4M + 8M without sharing, and each of the three terms divided by n in its stage.
    """
    n, held = 8, {}
    for stage, split in STAGES.items():
        layout = "{data: 8, fsdp: 1}" if stage == "data" else f"{{fsdp: 8, fsdp_shards: {stage}}}"
        _, arguments, temps = compiled(tmp_path, n, *WEIGHTS, f"parallel={layout}")
        parameters, gradients, state = (MATRICES // (n if shared else 1) + NORMS for shared in split)
        counts = 4 + 2 * 4 + 4 * 4  # the step, two counts of the optimizer's, and the generator's key
        batch = 5 * 4 * ROWS * LENGTH // n
        assert arguments == 4 * parameters + 8 * state + counts + batch
        held[stage] = temps, 4 * gradients
    # Gradients are temporaries. Where they are shared out, those of the layer at work are still whole.
    saved = held["data"][1] - held["gradients"][1] - 4 * LAYER
    for stage in ("data", "optimizer"):
        assert held[stage][0] - held["gradients"][0] == pytest.approx(saved, rel=0.1)
    assert held["parameters"][0] < held["gradients"][0]


@pytest.mark.long
def test_prefetch_takes_a_layer_more_or_two(tmp_path):
    """The next layer's weights, and a copy of them where the CPU's compiler hands them to a loop's next round."""
    overrides = (*WEIGHTS, "parallel.fsdp=8", "train.remat=full")
    without = temporaries(tmp_path, 8, *overrides, "parallel.prefetch=false")
    for scan in ("true", "false"):
        more = temporaries(tmp_path, 8, *overrides, f"train.scan_layers={scan}") - without
        assert 4 * LAYER <= more < 2.25 * 4 * LAYER


# --- Activations ---------------------------------------------------------------------------------


@pytest.mark.long
def test_remat_keeps_less(tmp_path):
    shape = "model={preset: tiny, hidden_size: 64, intermediate_size: 192, num_layers: 6, vocab_size: 64}"
    overrides = (shape, "train.global_batch_size=16", "data.sequence_length=128", "train.loss_chunk=64")
    none, dots, full = (
        temporaries(tmp_path, 8, *overrides, f"train.remat={remat}") for remat in ("none", "dots", "full")
    )
    assert none > 1.3 * dots > 1.3**2 * full


def test_no_device_holds_the_logits(tmp_path):
    tokens, vocabulary, tensor = 64 * 16, 8192, 8
    shape = (
        "model={preset: tiny, hidden_size: 16, intermediate_size: 48, num_layers: 2, num_heads: 8, head_dim: 4}",
        *("model.vocab_size=8192", "train.global_batch_size=64", "data.sequence_length=16", "parallel.tensor=8"),
    )
    part = 4 * tokens * vocabulary // tensor  # of all tokens, for a device's own words
    whole, chunked = (temporaries(tmp_path, tensor, *shape, f"train.loss_chunk={chunk}") for chunk in (tokens, 64))
    assert part < whole < tensor * part
    assert chunked < part
    assert whole - chunked > part  # the logits, if not also their gradients


@pytest.mark.long
def test_activations_fall_with_the_part_of_the_sequence(tmp_path):
    shape = (
        "model={preset: tiny, hidden_size: 128, intermediate_size: 256, num_heads: 2, num_layers: 4, vocab_size: 64}",
        *("train.global_batch_size=8", "data.sequence_length=256", "train.loss_chunk=64"),
    )
    found = {
        context: temporaries(tmp_path, context, *shape, f"parallel={{context: {context}, fsdp: 1}}")
        for context in (2, 4, 8)
    }
    assert found[2] / found[4] == pytest.approx(2, rel=0.15)
    assert found[4] / found[8] == pytest.approx(2, rel=0.15)
    gathered = temporaries(tmp_path, 8, *shape, "parallel={context: 8, fsdp: 1, context_attention: gathered}")
    assert gathered > found[8]  # all keys and values of a layer
