"""Every layout's collectives are those that its design calls for: kinds, axes, counts and bytes.

tests/program/golden/ has a summary of each, in the dtypes that the program asks for (a CPU's compiler widens bf16
later). TRAINFW_UPDATE_GOLDEN=1 pytest tests/program/test_collectives.py writes them anew.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import quicker, tiny_recipe
from trainfw import build_program
from trainfw.hardware import load_topology
from trainfw.hlo import Collective, collectives_of, partition
from trainfw.parallel import permute_problem

GOLDEN = Path(__file__).parent / "golden"
# The logits of a device's rows are far larger than its weights and activations.
SHAPE = (
    "model={preset: tiny, hidden_size: 16, intermediate_size: 48, num_layers: 4, num_heads: 8, head_dim: 4}",
    *("model.tie_embeddings=false", "model.vocab_size=1024"),
    *("data.sequence_length=128", "train.global_batch_size=16", "train.loss_chunk=64"),
    *("train.compute_dtype=bfloat16", "parallel.fsdp=1"),
)
MOE = "model.moe.num_experts=8 model.moe.experts_per_token=2"
LAYOUTS = {
    "data": "data=8",
    "fsdp": "fsdp=8",
    "fsdp-prefetched": "fsdp=8 remat=full",
    "fsdp-prefetched-unrolled": "fsdp=8 remat=full scan_layers=false",
    "fsdp-gradients": "fsdp=8 fsdp_shards=gradients accumulation_steps=2",
    "fsdp-optimizer": "fsdp=8 fsdp_shards=optimizer accumulation_steps=2",
    "hybrid": "data=2 fsdp=4 remat=full",
    "tensor": "tensor=8 remat=dots",  # more than kv heads
    "tensor-fsdp": "tensor=2 fsdp=4 remat=full",
    "context-ring": "context=4 fsdp=2 remat=full",
    "context-gathered": "context=4 fsdp=2 remat=full context_attention=gathered",
    "pipeline": "pipeline=4 data=2",
    "pipeline-interleaved": "pipeline=2 interleave=2 fsdp=2 tensor=2 remat=full",
    "expert-capacity": f"expert=4 fsdp=2 remat=full {MOE}",
    "expert-dropless": f"expert=4 fsdp=2 remat=full {MOE} model.moe.dispatch=dropless",
    "pipeline-expert": f"pipeline=2 fsdp=2 expert=2 remat=full {MOE}",
    "expert-context-tensor": f"expert=2 context=2 tensor=2 remat=full {MOE}",
    "fsdp-context-tensor": "fsdp=2 context=2 tensor=2 remat=full",
}
QUICK = {"fsdp", "tensor-fsdp", "pipeline-expert"}
"""The others are for `--all`."""
TRAIN = {"remat", "scan_layers", "accumulation_steps"}


def overrides(settings: str) -> list[str]:
    """`key=value`s with the sections of `parallel` and `train` left out."""

    def section(key: str) -> str:
        return "" if key.startswith("model.") else "train." if key in TRAIN else "parallel."

    return [*SHAPE, *(section(setting.split("=")[0]) + setting for setting in settings.split())]


def summary(collectives: list[Collective], program) -> str:
    found: dict[tuple[str, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for c in collectives:
        op = c.instruction.op_name
        phase = "2 backward" if "transpose(" in op else "1 forward" if "jvp(" in op else "3 update"
        key = (phase, c.kind, "*".join(c.axes(program.mesh) or ["?"]), c.dtype)
        found[key] = found[key][0] + c.times, found[key][1] + c.bytes * c.times
    return "".join(
        f"{phase[2:]:9} {kind:19} {axes:20} {dtype:5} {times:4} times {size:10,} bytes\n"
        for (phase, kind, axes, dtype), (times, size) in sorted(found.items())
    )


@pytest.mark.parametrize("name", quicker(LAYOUTS, QUICK))
def test_collectives_of_a_layout(name, tmp_path, capfd):
    program = build_program(tiny_recipe(tmp_path, *overrides(LAYOUTS[name])))
    collectives = collectives_of(
        partition(program.train_step.lower(program.abstract_state, program.abstract_batch)).module
    )
    assert "rematerialization" not in capfd.readouterr().err

    check_kinds_and_axes(collectives, program)
    check_that_no_logits_travel(collectives, program)

    text = summary(collectives, program)
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("TRAINFW_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def check_kinds_and_axes(collectives: list[Collective], program) -> None:
    layout, rules = program.layout, program.rules
    ring = layout.context > 1 and program.recipe.parallel.context_attention == "ring"
    moe = program.recipe.model.moe
    gathered = {rules.gathered("embed"), rules.gathered("expert_embed"), ("tensor",), ("context",)}
    if moe is not None and moe.dispatch == "dropless":
        gathered.add(("expert",))
    permuted = {("pipeline",), ("context",)} if ring else {("pipeline",)}
    exchanged = {("expert",)} if moe is not None and moe.dispatch == "capacity" else set()
    chip = load_topology("trn2.3xlarge", lnc=1)  # of as many cores
    for c in collectives:
        axes = c.axes(program.mesh)
        match c.kind:
            case "all-gather" | "reduce-scatter":
                assert axes in gathered, c
            case "all-reduce":
                assert axes, c
            case "all-to-all":
                assert axes in exchanged, c
            case "collective-permute":
                assert axes in permuted, c
                assert len(c.pairs) == program.mesh.size  # every device takes part
                assert permute_problem(chip, c.pairs) is None  # and all rings are closed
            case _:
                raise AssertionError(f"unexpected: {c}")
    if ring:
        assert any(c.kind == "collective-permute" and c.axes(program.mesh) == ("context",) for c in collectives)
    if layout.pipeline > 1:
        assert any(c.kind == "collective-permute" and c.axes(program.mesh) == ("pipeline",) for c in collectives)


def check_that_no_logits_travel(collectives: list[Collective], program) -> None:
    recipe, layout = program.recipe, program.layout
    tokens = recipe.train.global_batch_size * recipe.data.sequence_length // recipe.train.accumulation_steps
    tokens //= layout.pipeline * layout.data * layout.fsdp * layout.expert * layout.context
    logits = 2 * tokens * recipe.model.vocab_size // layout.tensor  # in bf16, and of one device's words only
    assert max(c.bytes for c in collectives) < logits


def test_a_program_that_the_partitioner_cannot_split_is_noticed(capfd):
    """What test_collectives_of_a_layout looks for does show where it happens."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

    def resharded(x):
        for spec in (P(None, None, ("a", "b", "c")), P("a", ("b", "c"), None)):
            x = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, spec))
        return x

    lowered = jax.jit(resharded).lower(jnp.zeros((16, 16, 16)))
    partition(lowered)
    assert "rematerialization" in capfd.readouterr().err


def test_a_gather_of_logits_is_noticed(tmp_path):
    program = build_program(tiny_recipe(tmp_path, *overrides("tensor=8")))
    mesh, recipe = program.mesh, program.recipe
    whole = (recipe.train.global_batch_size, recipe.data.sequence_length, recipe.model.vocab_size)
    split = NamedSharding(mesh, P(None, None, "tensor"))
    lowered = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P())).lower(
        jax.ShapeDtypeStruct(whole, jnp.bfloat16, sharding=split)
    )
    (gather,) = collectives_of(partition(lowered).module)
    with pytest.raises(AssertionError):
        check_that_no_logits_travel([gather], program)
