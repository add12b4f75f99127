"""One list says which layouts a recipe can have: programs, searches and the rules of sharding judge alike."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from trainfw import UserError, load_recipe
from trainfw.models import abstract_model
from trainfw.parallel import AXES, Layout, Rules
from trainfw.planning.search import candidates
from trainfw.program.fit import check_layout
from trainfw.recipe import layout_problems

SIZES = st.fixed_dictionaries({axis: st.sampled_from([1, 1, 1, 2, 3, 4, 8]) for axis in AXES})
SHAPES = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([96, 100]),
        "hidden_size": st.sampled_from([24, 36, 64]),
        "intermediate_size": st.sampled_from([48, 64]),
        "num_layers": st.sampled_from([4, 6, 12]),
        "num_heads": st.sampled_from([4, 8, 12]),
        "num_kv_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([2, 6, 16]),
        "moe": st.sampled_from(
            [
                None,
                {"num_experts": 4, "experts_per_token": 2},
                {"num_experts": 6, "experts_per_token": 1, "shared_intermediate_size": 36},
            ]
        ),
    }
)
BATCHES = st.fixed_dictionaries(
    {"global_batch_size": st.sampled_from([8, 24, 96, 288]), "accumulation_steps": st.sampled_from([1, 2])}
)


def made(model, sizes, train, length, **parallel):
    return load_recipe(
        {
            "model": model,
            "data": {"source": ["text.txt"], "sequence_length": length},
            "train": train,
            "parallel": sizes | parallel,
        }
    )


def refusal(judge) -> str:
    try:
        judge()
    except UserError as error:
        return str(error)
    return ""


def searched(recipe, layout) -> str:
    with mock.patch.object(candidates, "place", return_value=SimpleNamespace(hosts_read_shares=True)):
        return refusal(lambda: candidates._legal(recipe, mock.sentinel.topology, layout, own=True))


@given(SHAPES, SIZES, BATCHES, st.sampled_from([32, 96]), st.sampled_from([None, 2, 6]))
def test_a_program_and_a_search_judge_alike(model, sizes, train, length, microbatches):
    if sizes["pipeline"] == 1:
        microbatches = None
    recipe, layout = made(model, sizes, train, length, pipeline_microbatches=microbatches), Layout(**sizes)
    by_program, by_search = refusal(lambda: check_layout(recipe, layout, None)), searched(recipe, layout)
    assert bool(by_program) == bool(by_search), (by_program, by_search)
    if by_search and not by_search.startswith("the model is not to be spread"):
        assert by_program.split(" = ")[0].endswith(by_search.split(" = ")[0])  # of the same key


@given(SHAPES, SIZES, st.sampled_from([{}, {"embed": ["fsdp"]}, {"embed": ["data", "fsdp"]}]))
def test_what_is_on_no_list_every_rule_can_split(model, sizes, rules):
    recipe = made(model, sizes, {"global_batch_size": 8}, 32, rules=rules)
    if any(problem.key.startswith(("model", "parallel")) for problem in layout_problems(recipe, Layout(**sizes))):
        return
    table = Rules(AbstractMesh(tuple(sizes.values()), tuple(sizes)), recipe.parallel.rules)
    for path, param in nnx.to_flat_state(nnx.state(abstract_model(recipe.model))):
        table.spec(".".join(map(str, path)), param.shape, param.axes)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tensor": 3}, "model.num_heads = 8: does not divide over parallel.tensor = 3; the nearest size that does: 2"),
        ({"fsdp": 5, "context": 2}, "model.hidden_size = 64: does not divide over fsdp(5) * context(2) = 10; the "),
        ({"tensor": 8}, "model.vocab_size = 100: does not divide over parallel.tensor = 8; 104 does, with rows that "),
        ({"expert": 2}, "parallel.expert = 2: spreads experts, and the model has none (model.moe); use fsdp"),
    ],
)
def test_what_would_do_is_said(sizes, said):
    model = {"preset": "tiny", "vocab_size": 100, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16}
    recipe = made(model, {"fsdp": 1} | sizes, {"global_batch_size": 40}, 40)
    assert said in refusal(lambda: check_layout(recipe, Layout(**sizes), None))


def test_parts_of_a_shared_head_are_whole_numbers():
    model = {"preset": "tiny", "vocab_size": 96, "num_heads": 8, "num_kv_heads": 1, "head_dim": 6}
    recipe = made(model, {"tensor": 4, "fsdp": 1}, {}, 32)
    assert "model.head_dim = 6: does not divide over parallel.tensor = 4" in refusal(
        lambda: check_layout(recipe, Layout(tensor=4), None)
    )
