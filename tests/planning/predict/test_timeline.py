"""The step in order: its phases add up to its time, and a turn of the loop over layers is in the program's order."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from tests.helpers import tiny_recipe
from trainfw.hardware import load_topology
from trainfw.parallel import Layout, place
from trainfw.planning import Analysis, Assumptions, Matmul, Streamed, Timeline, Transfer, plan, step_time, timeline

TRN2 = "trn2.48xlarge"


def by_part(found: Timeline, *, hidden: bool) -> dict[str, float]:
    seconds: defaultdict[str, float] = defaultdict(float)
    for stretch in found.phases:
        for segment in stretch.segments:
            if segment.hidden == hidden:
                seconds[segment.part] += segment.seconds * stretch.times
    return dict(seconds)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_phases_add_up_to_the_step(tmp_path, overlap):
    layout = Layout(fsdp=16, tensor=4)
    analysis = Analysis(
        layout=layout,
        matmuls=(
            Matmul(1, 4096, 4096, 4096, "bf16", 300, phase="forward"),
            Matmul(1, 4096, 4096, 4096, "bf16", 700),
            Matmul(1, 4096, 128, 4096, "bf16", 100, attention=True, phase="forward"),
        ),
        transfers=(
            Transfer("all-gather", ("fsdp",), "bf16", 10**9, 8, "forward"),
            Transfer("reduce-scatter", ("fsdp",), "bf16", 10**9, 8),
            Transfer("all-reduce", ("tensor",), "bf16", 10**8, 8),
            Transfer("all-reduce", ("fsdp", "tensor"), "f32", 4, 1, "update"),
        ),
        streamed=(
            Streamed("model", 1e11, "forward"),
            Streamed("attention", 2e11, "forward"),
            Streamed("model", 3e11),
            Streamed("update", 1e11),
            Streamed("update", 2e11, "update"),
        ),
    )
    recipe = tiny_recipe(tmp_path, f"hardware.topology={TRN2}", "train.compute_dtype=bfloat16")
    time = step_time(analysis, place(load_topology(TRN2), layout), recipe, Assumptions(overlap=overlap))
    found = timeline(analysis, time, 8)
    assert found.seconds == pytest.approx(time.seconds, rel=1e-9)
    assert by_part(found, hidden=False) == pytest.approx({part: s for part, s in time.parts.items() if s})
    assert by_part(found, hidden=True) == pytest.approx({axes: s for axes, s in time.hidden.items() if s})
    assert [(s.phase, s.times) for s in found.phases] == [("forward", 8), ("backward", 8), ("update", 1)]
    forward, backward, update = found.phases
    assert {s.part for s in forward.segments} >= {"matmul", "attention", "memory"}
    assert "optimizer" in {s.part for s in backward.segments} & {s.part for s in update.segments}
    for stretch in found.phases:
        waited = [segment for segment in stretch.segments if not segment.hidden]
        for one, other in pairwise(waited):
            assert one.start + one.seconds == pytest.approx(other.start)
        assert waited[-1].start + waited[-1].seconds == pytest.approx(stretch.seconds)
    products = [s for s in backward.segments if s.stream == "tensor engine"]
    beside = [s for s in backward.segments if s.hidden]
    assert all(s.start == products[0].start for s in beside)


ON_EIGHT = ["hardware.topology=h100-8", "parallel={fsdp: 4, tensor: 2}", "train.compute_dtype=bfloat16"]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    more = ["model.num_layers=4", "train.accumulation_steps=2", "train.remat=full", "train.scan_layers=true"]
    return plan(tiny_recipe(tmp_path_factory.mktemp("scanned"), *ON_EIGHT, *more))


def test_phases_are_read_from_the_program(scanned):
    analysis = scanned.analysis
    flops: Counter[tuple[str, bool]] = Counter()
    for matmul in analysis.matmuls:
        flops[matmul.phase, matmul.backward] += matmul.flops
    assert flops.keys() == {("forward", False), ("forward", True), ("backward", True), ("backward", False)}
    # The gradient of the loss is computed with the loss.
    logits = flops["forward", True] / 2
    assert flops["backward", True] == pytest.approx(2 * (flops["forward", False] - logits))
    assert flops["backward", False] < flops["forward", False] - logits  # computed again: all but a layer's last product
    gathered = {t.phase for t in analysis.transfers if t.kind == "all-gather" and t.axes == ("fsdp",)}
    assert gathered == {"forward", "backward"}
    assert {t.phase for t in analysis.transfers if t.kind == "reduce-scatter" and t.axes == ("fsdp",)} == {"backward"}
    # Norms, metrics, and gradients of what every core holds.
    assert all(t.bytes <= 4 * 4 * 64 for t in analysis.transfers if t.phase == "update")
    # Gradients of microbatches are added up; the optimizer runs once.
    assert {s.phase for s in analysis.streamed if s.kind == "update"} == {"backward", "update"}
    assert scanned.timeline.seconds == pytest.approx(scanned.time.seconds, rel=1e-9)


def test_a_turn_of_the_loop_is_in_the_order_of_the_program(scanned):
    layers = scanned.recipe.model.num_layers
    forward, backward = scanned.timeline.loops
    for turn, whole in ((forward, scanned.timeline.phases[0]), (backward, scanned.timeline.phases[1])):
        # The last layer forward, and the first backward, have no other to gather weights for meanwhile.
        assert (turn.phase, turn.times) == (whole.phase, 2 * (layers - 1))
        assert 0.1 < turn.seconds * turn.times / (whole.seconds * whole.times) < 1
    # Queries and keys are made, then the scores, then what they weigh, then the feed-forward layer.
    products = [segment.part for segment in forward.segments if segment.stream == "tensor engine"]
    first, last = products.index("attention"), len(products) - 1 - products[::-1].index("attention")
    assert 0 < first < last < len(products) - 1
    assert {segment.stream for segment in forward.segments} >= {"tensor engine", "memory", "fsdp", "tensor"}
    # The turns take all products of the forward pass, but for the last layer's and those of the logits.
    analysis = scanned.analysis
    shares: Counter[int] = Counter()
    for operation in analysis.loops[0].operations:
        if operation.of == "matmuls":
            shares[operation.index] += operation.share * forward.times
    assert list(shares.values()) == pytest.approx(len(shares) * [(layers - 1) / layers])
    rest = [m for i, m in enumerate(analysis.matmuls) if m.phase == "forward" and i not in shares]
    assert [258 // 2 in (m.m, m.n, m.k) for m in rest] == [True] * 3


@pytest.mark.long
def test_unrolled_layers_have_phases_but_no_turn(tmp_path):
    made = plan(tiny_recipe(tmp_path, *ON_EIGHT, "train.scan_layers=false", "optimizer.name=muon"))
    assert made.timeline.loops == ()
    assert made.timeline.seconds == pytest.approx(made.time.seconds, rel=1e-9)
    assert all(stretch.seconds > 0 for stretch in made.timeline.phases)
    update = made.timeline.phases[2]
    assert "tensor engine" in {segment.stream for segment in update.segments}  # which orthogonalises what it adds
    assert "then the update" in str(made)
