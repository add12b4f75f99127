"""The time of a step, and what is compiled in place of a run that is too large."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.helpers import tiny_recipe
from tests.planning.analysing import analyse
from trainfw import Recipe, UserError
from trainfw.hardware import Topology, load_topology
from trainfw.models import flops_per_token
from trainfw.parallel import Layout, place
from trainfw.planning import Analysis, Assumptions, Matmul, Streamed, Transfer, step_time
from trainfw.planning.predict.step_time import EFFICIENCY_SPREAD, efficiency_range, shape_efficiency

TRN2, H100 = "trn2.48xlarge", "h100-8"
EFFICIENCY = load_topology(TRN2).figures["chip.matmul_efficiency"].number


def recipe_for(tmp_path: Path, topology: str, *overrides: str) -> Recipe:
    return tiny_recipe(tmp_path, f"hardware.topology={topology}", "train.compute_dtype=bfloat16", *overrides)


def some_analysis(layout: Layout) -> Analysis:
    """Of round numbers, a second each on a core of Trainium2."""
    hbm, peak = 2.9e12 / 4, 667e12 / 4
    side = 128
    return Analysis(
        layout=layout,
        matmuls=(
            Matmul(1, side, 512, side, "bf16", round(peak * EFFICIENCY / (2 * side * 512 * side))),
            Matmul(1, side, 512, side, "f32", 100, mixed=True, attention=True, backward=True),
        ),
        transfers=(
            Transfer("all-gather", ("fsdp",), "bf16", 10**9, 100),
            Transfer("all-reduce", ("tensor",), "bf16", 10**9, 100),
        ),
        streamed=(Streamed("model", 2 * hbm), Streamed("attention", 3 * hbm), Streamed("update", hbm)),
    )


@pytest.fixture
def case(tmp_path):
    recipe = recipe_for(tmp_path, TRN2, "parallel.fsdp=16", "parallel.tensor=4")
    layout = Layout(fsdp=16, tensor=4)
    return some_analysis(layout), place(load_topology(TRN2), layout), recipe


def test_parts_add_up(case):
    time = step_time(*case)
    assert set(time.parts) == {"matmul", "attention", "memory", "optimizer", "fsdp", "tensor"}
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    assert time.low < time.seconds < time.high
    assert time.parts["matmul"] == pytest.approx(1, rel=1e-3)
    assert (time.parts["memory"], time.parts["optimizer"]) == (pytest.approx(2), pytest.approx(1))
    assert time.bound_by == "hbm"
    assert any(f"{EFFICIENCY:.0%}" in text and "fitted" in text for text in time.assumptions)
    assert any("NeuronLink" in text or "column" in text for text in time.assumptions)


@pytest.mark.parametrize(
    ("name", "parameters"), [("trn1.32xlarge", {}), (H100, {}), ("trn1.32xlarge", {"chip.matmul_efficiency": "0.2"})]
)
def test_the_range_is_as_wide_as_published_runs_lie_apart(tmp_path, name, parameters):
    topology = load_topology(name, parameters=parameters)
    layout = Layout(fsdp=topology.cores)
    around, figure = topology.chip.matmul_efficiency_range, topology.chip.matmul_efficiency
    assert around is not None
    assert figure is not None
    value = figure.number
    assert around.low < value * (1 - EFFICIENCY_SPREAD) < value * (1 + EFFICIENCY_SPREAD) < around.high
    products = Analysis(layout, (Matmul(1, 2**14, 2**14, 2**14, "bf16", 10),), (), ())
    time = step_time(products, place(topology, layout), recipe_for(tmp_path, name, "train.global_batch_size=32"))
    assert time.seconds / time.low == pytest.approx(around.high / value)
    assert time.seconds / time.high == pytest.approx(around.low / value)


def test_the_range_of_a_chip_whose_runs_agree_is_the_least(case):
    assert efficiency_range(load_topology(TRN2)) == (1 - EFFICIENCY_SPREAD, 1 + EFFICIENCY_SPREAD)
    assert efficiency_range(load_topology("cpu")) == (1, 1)


def test_what_links_reach_is_said(tmp_path, case):
    layout = Layout(data=2, fsdp=8)
    recipe = recipe_for(tmp_path, H100, "hardware.count=2", "parallel.data=2", "parallel.fsdp=8")
    time = step_time(some_analysis(layout), place(load_topology(H100, count=2), layout), recipe)
    expected = "collectives reach the full bandwidth of their links"
    assert f"{expected}, but 94% of it along network, 80% of it along gpu" in time.assumptions
    assert expected in step_time(*case).assumptions


def test_collectives_of_parameters_are_hidden_by_as_much_as_is_assumed(case):
    analysis, placement, recipe = case
    whole = dict(step_time(analysis, placement, recipe, Assumptions(overlap=0.0)).parts)
    half = step_time(analysis, placement, recipe)
    assert half.parts["fsdp"] == pytest.approx(whole["fsdp"] / 2)
    assert half.hidden == {"fsdp": pytest.approx(whole["fsdp"] / 2)}
    assert half.parts["tensor"] == whole["tensor"]  # waited for


@pytest.mark.parametrize(
    ("kind", "axes", "beside"),
    [
        ("all-gather", ("fsdp", "expert", "context"), True),  # weights
        ("collective-permute", ("context",), True),
        ("collective-permute", ("pipeline",), True),
        ("all-reduce", ("pipeline", "data"), True),
        ("all-gather", ("context",), False),  # keys and values
        ("all-to-all", ("expert",), False),
        ("reduce-scatter", ("tensor",), False),
    ],
)
def test_what_a_block_works_on_is_waited_for(case, kind, axes, beside):
    analysis, _, recipe = case
    layout = Layout(pipeline=2, data=2, fsdp=2, expert=2, context=2, tensor=2)
    placement = place(load_topology(H100, count=8), layout)
    moved = replace(analysis, layout=layout, transfers=(Transfer(kind, axes, "bf16", 10**6, 1),))
    assert bool(sum(step_time(moved, placement, recipe).hidden.values())) == beside


@pytest.mark.parametrize(("form", "forward", "backward"), [("ring", 0.8, 0.8), ("gathered", 2 / 3, 5 / 6)])
def test_over_context_the_program_leaves_out_most_of_what_is_masked(case, form, forward, backward):
    analysis, _, recipe = case
    layout = Layout(fsdp=4, context=2)
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"context_attention": form})})
    for is_backward, share in ((False, forward), (True, backward)):
        product = Matmul(1, 4096, 4096, 4096, "bf16", 100, attention=True, backward=is_backward)
        seconds = [
            step_time(replace(analysis, layout=at, matmuls=(product,)), where, recipe, Assumptions(attention="fused"))
            for at, where in (
                (layout, place(load_topology(H100), layout)),
                (Layout(fsdp=8), place(load_topology(H100), Layout(fsdp=8))),
            )
        ]
        alone = 5 / 8 if is_backward else 1 / 2
        assert seconds[0].products[0] / seconds[1].products[0] == pytest.approx(share / alone)


def test_no_more_is_hidden_than_there_is_to_hide_it_behind(case):
    analysis, placement, recipe = case
    long = replace(analysis, transfers=(Transfer("all-gather", ("fsdp",), "bf16", 10**9, 10_000),))
    time = step_time(long, placement, recipe)
    assert sum(time.hidden.values()) < 1.1 < time.parts["fsdp"]
    assert time.bound_by == "links.column"


def test_a_fused_kernel_leaves_scores_on_the_chip(case):
    analysis, placement, recipe = case
    xla, fused = (step_time(analysis, placement, recipe, Assumptions(attention=how)) for how in ("xla", "fused"))
    assert xla.parts["attention"] > 3
    # Half of the scores, a fifth product backward, and bf16 throughout.
    product = 100 * 2 * 128 * 512 * 128 / (667e12 / 4 * EFFICIENCY)
    assert fused.parts["attention"] == pytest.approx(product / 2 * 5 / 4)
    assert fused.parts["memory"] == xla.parts["memory"]


def test_mixed_products_run_at_the_wider_rate(case):
    analysis, placement, recipe = case
    mixed = replace(analysis, matmuls=(Matmul(1, 4096, 4096, 4096, "f32", 100, mixed=True),))
    wide, narrow = (step_time(mixed, placement, recipe, Assumptions(mixed=rate)) for rate in ("wide", "narrow"))
    assert wide.parts["matmul"] / narrow.parts["matmul"] == pytest.approx(667 / 181)


def test_mfu_is_of_the_whole_run(case):
    analysis, placement, recipe = case
    time = step_time(analysis, placement, recipe)
    tokens = recipe.train.global_batch_size * recipe.data.sequence_length
    flops = tokens * flops_per_token(recipe.model, recipe.data.sequence_length)
    assert time.mfu == pytest.approx(flops / time.seconds / (16 * 667e12))


def test_a_product_is_no_faster_than_its_operands_come(case):
    analysis, placement, recipe = case
    thin = Matmul(1, 8, 512, 128, "bf16", 1, bytes=10**9)
    time = step_time(replace(analysis, matmuls=(thin,)), placement, recipe)
    assert time.parts["matmul"] == pytest.approx(1e9 / (2.9e12 / 4))


@pytest.mark.parametrize(
    ("m", "n", "k", "share"),
    [
        (4096, 4096, 4096, 1.0),
        (4096, 4096, 64, 0.5),  # half of the rows
        (4096, 64, 4096, 1.0),  # the short dim passes through, in no fewer cycles than it has
        (4096, 32, 4096, 0.5),  # in 64 cycles
        (64, 64, 128, 0.5),  # stays, on half of the columns
        (4096, 544, 128, 544 / 640),  # stays on five times 128 columns; passing, 512 + 64 cycles: 544 / 576
    ],
)
def test_shapes_that_fill_no_tile_waste_the_rest(m, n, k, share):
    topology = load_topology(TRN2)
    expected = 544 / 576 if n == 544 else share
    assert shape_efficiency(topology, m, n, k) == pytest.approx(expected)
    assert shape_efficiency(topology, n, m, k) == pytest.approx(expected)
    assert shape_efficiency(load_topology(H100), m, n, k) == 1


def test_hardware_without_figures_is_an_error(tmp_path):
    recipe = recipe_for(tmp_path, "cpu", "parallel.fsdp=1")
    layout = Layout()
    with pytest.raises(UserError, match=r"chip\.(hbm_bandwidth|peak_flops)"):
        step_time(some_analysis(layout), place(load_topology("cpu"), layout), recipe)


@pytest.mark.parametrize("chip", [TRN2, "trn1.32xlarge", H100])
def test_efficiencies_say_where_they_are_from(chip):
    topology: Topology = load_topology(chip)
    figure = topology.figures["chip.matmul_efficiency"]
    assert 0 < figure.number < 1
    assert "plan_accuracy.py" in figure.source
    faster = load_topology(chip, parameters={"chip.matmul_efficiency": "0.9"})
    assert faster.figures["chip.matmul_efficiency"].number == 0.9


# Shortened axes -------------------------------------------------------------------------------------------------------


def counted(analysis: Analysis) -> tuple[dict[Matmul, int], dict[Transfer, int]]:
    products = {replace(m, times=1): m.times for m in analysis.matmuls}
    return products, {replace(t, times=1): t.times for t in analysis.transfers}


@pytest.mark.long
@pytest.mark.parametrize(("sizes", "most"), [({"fsdp": 8}, 4), ({"data": 2, "fsdp": 4}, 4)])
def test_a_shorter_fsdp_tells_of_the_longer(tmp_path, sizes, most):
    overrides = [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    recipe = recipe_for(
        tmp_path,
        H100,
        *overrides,
        "train.global_batch_size=16",
        "train.accumulation_steps=2",
        "data.sequence_length=128",
    )
    whole, short = (analyse(recipe, most=devices)[0] for devices in (8, most))
    assert 0 < whole.streamed_bytes("update") < whole.streamed_bytes()
    assert short.layout == whole.layout
    assert counted(short) == counted(whole)
    # Norms and the batch are no shares of anything; weights are cast before they are gathered.
    assert short.streamed_bytes("update") == pytest.approx(whole.streamed_bytes("update"), rel=0.05)
    assert whole.streamed_bytes() <= short.streamed_bytes() < 1.1 * whole.streamed_bytes()


_REPLICAS = """
import dataclasses, sys
from trainfw import backends, load_recipe
backends.prepare(2048)
from tests.planning.analysing import analyse
from trainfw.planning.read_step import analysis
recipe = load_recipe(sys.argv[1], sys.argv[2:])
small = analyse(recipe)[0]
analysis.REPLICAS = 512
whole, program, _ = analyse(recipe)
assert program.mesh.size == 2048, program.mesh
for one, other in ((small.matmuls, whole.matmuls), (small.transfers, whole.transfers)):
    assert sorted(map(repr, one)) == sorted(map(repr, other)), (one, other)
assert small.streamed_bytes() == whole.streamed_bytes()
print("agree")
"""


@pytest.mark.long
def test_two_replicas_tell_of_five_hundred(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    tiny_recipe(tmp_path)
    overrides = ["hardware.topology=trn2-ultraserver", "hardware.count=8", "parallel.data=512", "parallel.fsdp=2"]
    overrides += ["parallel.tensor=2", "train.global_batch_size=1024", "train.compute_dtype=bfloat16"]
    ran = subprocess.run(
        [sys.executable, "-c", _REPLICAS, str(recipe), *overrides], capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "agree", ran.stderr[-2000:]


SIZES = [64, 256, 1024]


@pytest.fixture
def measured(tmp_path):
    """A topology of one's own: rates of products by m * n * k, of elementwise operations by size."""
    file = tmp_path / "mine.yaml"
    cube = [[[1e6 * math.sqrt(m * n * k) for k in SIZES] for n in SIZES] for m in SIZES]
    chip = {
        "description": "as measured",
        "cores": 1,
        "device_kinds": {1: ["cpu"]},
        "peak_flops": {"float32": {"value": "0.1 TFLOP/s", "source": "here"}},
        "hbm_bandwidth": {"value": "50 GB/s", "source": "here"},
        "matmul_rates": {"sizes": SIZES, "rates": {"float32": cube}, "source": "measured here"},
        "elementwise_rates": {"sizes": [2**20, 2**22], "rates": [4e9, 1e9], "source": "measured here"},
    }
    file.write_text(yaml.safe_dump({"description": "mine", "extends": "cpu", "chip": chip}))
    return file


def test_measured_rates_lie_between_those_of_the_nearest_sizes(measured):
    topology = load_topology(str(measured))

    def rate(m, n, k):
        return shape_efficiency(topology, m, n, k, "f32") * topology.peak_flops("float32")

    for m, n, k in ((64, 64, 64), (256, 1024, 64), (128, 512, 300), (1024, 100, 700)):
        assert rate(m, n, k) == pytest.approx(1e6 * math.sqrt(m * n * k))
    assert rate(8, 4096, 64) == pytest.approx(1e6 * math.sqrt(64 * 1024 * 64))  # outside: the nearest
    assert shape_efficiency(topology, 64, 64, 64, "bf16") == 1.0  # not measured


def test_a_step_runs_at_measured_rates(tmp_path, measured):
    recipe = tiny_recipe(tmp_path, f"hardware.topology={measured}")
    placement = place(recipe.hardware.load(), Layout())
    analysis = Analysis(
        layout=Layout(),
        matmuls=(Matmul(2, 256, 256, 256, "f32", 10),),
        transfers=(),
        streamed=tuple(Streamed("model", 1e9, array=array) for array in (2**20, 2**21, 2**24, 0)),
    )
    time = step_time(analysis, placement, recipe)
    assert time.parts["matmul"] == pytest.approx(10 * 2 * 2 * 256**3 / (1e6 * 256**1.5))
    assert time.streamed == tuple(map(pytest.approx, (0.25, 0.5, 1.0, 1.0)))  # what nobody knows: as the largest
    assert any("rates of their shapes (measured here)" in text for text in time.assumptions)


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        ("matmul_rates", {"sizes": SIZES[:2]}, "expected 2 x 2 x 2 rates"),
        ("matmul_rates", {"sizes": [256, 64, 1024]}, "each larger than the one before"),
        ("elementwise_rates", {"rates": [1e9]}, "expected 2, one for each of sizes"),
    ],
)
def test_measured_rates_that_do_not_match_their_sizes_are_refused(measured, section, values, problem):
    tree = yaml.safe_load(measured.read_text())
    tree["chip"][section] |= values
    measured.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=problem):
        load_topology(str(measured.rename(measured.with_name(f"{section}.yaml"))))


def test_attention_is_planned_as_the_recipe_says(case):
    analysis, placement, recipe = case
    fused = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"fused_attention": True})})
    expected = step_time(analysis, placement, recipe, Assumptions(attention="fused")).seconds
    assert step_time(analysis, placement, fused).seconds == expected < step_time(analysis, placement, recipe).seconds
