"""The search: candidates are legal, formulas near the compiler, and the recipe that is written the winner."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from typer.testing import CliRunner

from tests.helpers import quicker, tiny_recipe, write_recipe
from tests.planning.analysing import analyse
from trainfw import UserError, load_recipe
from trainfw.cli import app
from trainfw.hardware import load_topology
from trainfw.parallel import Layout, place
from trainfw.planning import check_out, default_out, search_layouts, survey, write_winner
from trainfw.planning.predict.closed_form import closed_analysis, closed_memory, state_bytes
from trainfw.planning.search.candidates import layouts, pareto, settings
from trainfw.program import build_program

SMALL = ("hardware.topology=trn2.3xlarge", "parallel.fsdp=4", "train.global_batch_size=16")
LARGE = ("hardware.topology=trn2.48xlarge", "model.vocab_size=256", "train.global_batch_size=192")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(directory, what a search of the tiny recipe on one chip found)."""
    directory = tmp_path_factory.mktemp("search")
    recipe = tiny_recipe(directory, *SMALL)
    return directory, search_layouts(survey(recipe), most=3, limit=120)


def test_layouts_are_all_divisions_of_the_cores():
    recipe = load_recipe("quickstart")
    found = list(layouts(12, recipe))
    assert all(math.prod(layout.sizes.values()) == 12 for layout in found)
    wanted = {(d, f, t) for d, f, t in itertools.product(range(1, 13), repeat=3) if d * f * t == 12}
    assert {(layout.data, layout.fsdp, layout.tensor) for layout in found} == wanted
    assert len(found) == len(wanted)
    # The other axes stay as they are.
    piped = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"pipeline": 2, "context": 3})})
    of_two = [{"data": 2}, {"fsdp": 2}, {"tensor": 2}]
    both = {layout for layout in layouts(12, piped) if (layout.pipeline, layout.context) == (2, 3)}
    assert both == {Layout(pipeline=2, context=3, **sizes) for sizes in of_two}
    assert {layout.context for layout in layouts(10, piped)} == {1}


def test_other_axes_are_tried_where_they_may_pay():
    def tried(name, *overrides):
        recipe = load_recipe(name, overrides)
        found = set(layouts(recipe.hardware.load().cores, recipe))
        return [{getattr(layout, axis) for layout in found} for axis in ("pipeline", "expert", "context")]

    assert tried("llama3.1-8b-trn2-ultraserver") == [{1}, {1}, {1}]
    assert tried("llama3.1-70b-trn2-ultraserver", "hardware.count=4")[0] == {1, 2, 4}
    assert tried("llama3.1-8b-128k-trn2-ultraserver") == [{1}, {1}, {1, 2, 4, 8, 16, 32}]
    assert tried("qwen3-30b-a3b-trn2-ultraserver") == [{1}, {1, 2, 4, 8, 16, 32}, {1}]


def test_candidates_are_legal_and_the_others_have_a_reason(tmp_path):
    recipe = tiny_recipe(tmp_path, *LARGE)
    found = survey(recipe)
    assert found.candidates
    legal = set()
    for candidate in found.candidates:
        layout, train = candidate.layout, candidate.recipe.train
        assert math.prod(layout.sizes.values()) == found.topology.cores == 64
        assert recipe.model.num_heads % layout.tensor == recipe.model.hidden_size % layout.fsdp == 0
        assert train.global_batch_size == 192
        assert 192 % (layout.batch_shards * train.accumulation_steps) == 0
        assert all(axis.problem is None for axis in place(found.topology, layout).axes)
        legal.add(layout)
    assert found.dropped.total() + len(legal) == len(list(layouts(64, recipe)))
    assert any(reason.startswith("model.num_heads = 4") for reason in found.dropped)
    # With every number of microbatches that divides, remat policy, form of the stack, and stage of ZeRO.
    of_one = [c for c in found.candidates if c.layout == Layout(fsdp=32, tensor=2)]
    assert len(of_one) == len({str(settings(c.recipe)) for c in of_one}) == len([1, 2, 3, 6]) * 3 * 2 * 3
    # Where there is nothing to split, there is nothing to choose.
    of_one = [c for c in found.candidates if c.layout == Layout(data=64)]
    assert len(of_one) == len([1, 3]) * 3 * 2


def test_parameters_stay_whole_only_where_they_fit(tmp_path):
    found = survey(tiny_recipe(tmp_path, *LARGE, "model.preset=llama3.1-70b", "data.sequence_length=8192"))
    whole = {c.layout.tensor for c in found.candidates if c.recipe.parallel.fsdp_shards != "parameters"}
    assert not whole  # 280 GB over 8 at most, on cores of 24 GiB
    assert any(c.layout.fsdp > 1 for c in found.candidates)


def test_rules_stay_as_they_are(tmp_path):
    found = survey(tiny_recipe(tmp_path, *LARGE, "parallel.rules={norm: [fsdp]}"))
    assert found.candidates
    assert all(c.recipe.parallel.rules == {"norm": ["fsdp"]} for c in found.candidates)


@pytest.mark.long
def test_other_axes_are_legal_as_in_the_program(tmp_path):
    more = ("model.num_layers=6", "data.sequence_length=64", "train.global_batch_size=384")
    on_switches = (*LARGE, "hardware={topology: h100-8, count: 8}", *more)
    found = survey(tiny_recipe(tmp_path, *on_switches, "parallel={pipeline: 2, context: 4, fsdp: 8}"))
    assert {(c.layout.pipeline, c.layout.context) for c in found.candidates} >= {(2, 4), (1, 4), (2, 1), (1, 1)}
    assert all(c.recipe.parallel.interleave == 1 for c in found.candidates)
    assert found.own is not None
    found = survey(tiny_recipe(tmp_path, *on_switches, "parallel={pipeline: 4, fsdp: 16}"))
    assert found.own is None
    assert {c.layout.pipeline for c in found.candidates} == {1, 2}
    assert found.dropped["model.num_layers = 6 does not divide over pipeline"] > 0


def test_a_batch_that_no_layout_divides_leaves_nothing(tmp_path):
    found = survey(tiny_recipe(tmp_path, *LARGE[:2], "train.global_batch_size=7"))
    assert not found.candidates
    assert found.own is None
    assert "7" in found.own_problem
    assert found.dropped["train.global_batch_size = 7 does not divide over data * fsdp"] > 0
    result = search_layouts(found)
    assert result.winner is None
    assert not result.plans
    assert "no winner" in str(result)
    assert "cannot be planned" in str(result)
    with pytest.raises(UserError, match="nothing that was compiled fits"):
        write_winner(result, "quickstart", tmp_path / "out.yaml")


@pytest.mark.parametrize("objective", ["time", "cost", "memory"])
def test_the_best_by_formula_is_always_compiled(tmp_path, objective):
    found = survey(tiny_recipe(tmp_path, *LARGE), objective)
    value = {
        "time": lambda c: c.estimate.seconds,
        "cost": lambda c: c.estimate.seconds,
        "memory": lambda c: c.estimate.memory,
    }[objective]
    chosen = found.chosen(3)
    assert len(chosen) == 3 == len({str(settings(c.recipe)) for c in chosen})
    assert min(map(value, chosen)) == min(value(c) for c in found.candidates if c.recipe.train.scan_layers)
    assert all(c.recipe.train.scan_layers for c in chosen)


def test_the_analytic_pass_needs_no_jax(tmp_path):
    path = write_recipe(tmp_path)
    code = (
        "import sys; from trainfw.recipe import load_recipe; from trainfw.planning import survey\n"
        f"found = survey(load_recipe({str(path)!r}, {SMALL!r}))\n"
        "assert found.candidates and found.simulated_cores == 4, found\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("optimizer", quicker(["adamw", "lion", "adafactor", "muon"], ["adafactor", "muon"]))
@pytest.mark.parametrize("model", [(), ("model.tie_embeddings=false", "model.qk_norm=true", "model.qkv_bias=true")])
def test_state_is_counted_as_it_is_sharded(tmp_path, optimizer, model):
    recipe = tiny_recipe(
        tmp_path, "parallel.fsdp=4", "parallel.tensor=2", f"optimizer.name={optimizer}", "model.hidden_size=256", *model
    )
    state = build_program(recipe, jax.devices()).abstract_state
    counted = state_bytes(recipe, Layout(fsdp=4, tensor=2))

    def held(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert counted["parameters"] == held(state.params)
    # Beside counters, and Muon's three coefficients.
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.shape not in ((), (3,))]
    assert counted["optimizer_state"] == held(arrays)


@pytest.mark.parametrize("shared", ["null", "32"])
def test_experts_are_counted_as_they_are_sharded(tmp_path, shared):
    moe = f"model.moe={{num_experts: 8, experts_per_token: 2, shared_intermediate_size: {shared}}}"
    layout = Layout(fsdp=2, expert=2, tensor=2)
    recipe = tiny_recipe(tmp_path, moe, *(f"parallel.{axis}={size}" for axis, size in layout.sizes.items()))
    state = build_program(recipe, jax.devices()).abstract_state
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(state.params))
    assert state_bytes(recipe, layout)["parameters"] == held


@pytest.mark.parametrize("stage", ["gradients", "optimizer"])
def test_state_is_counted_by_what_fsdp_shards(tmp_path, stage):
    layout = ("parallel.fsdp=4", "parallel.tensor=2", f"parallel.fsdp_shards={stage}")
    recipe = tiny_recipe(tmp_path, *layout, "optimizer.ema=0.999")
    state = build_program(recipe, jax.devices()).abstract_state
    counted = state_bytes(recipe, Layout(fsdp=4, tensor=2))
    for key, tree in (("parameters", state.params), ("optimizer_state", state.opt_state)):
        arrays = [x for x in jax.tree.leaves(tree) if x.shape]
        assert counted[key] == sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize(
    ("layout", "remat", "shards"),
    [
        pytest.param(Layout(fsdp=4), "full", "parameters", marks=pytest.mark.long),
        pytest.param(Layout(data=2, tensor=2), "none", "parameters", marks=pytest.mark.long),
        pytest.param(Layout(fsdp=2, tensor=2), "full", "parameters", marks=pytest.mark.long),
        pytest.param(Layout(fsdp=4), "full", "gradients", marks=pytest.mark.long),
        pytest.param(Layout(data=2, fsdp=2), "dots", "optimizer", marks=pytest.mark.long),
        pytest.param(Layout(fsdp=2, tensor=2), "none", "optimizer", marks=pytest.mark.long),
        pytest.param(Layout(fsdp=2, context=2), "none", "parameters", marks=pytest.mark.long),
        (Layout(pipeline=2, fsdp=2), "full", "parameters"),
    ],
)
def test_formulas_have_the_products_and_collectives_of_the_program(tmp_path, layout, remat, shards):
    recipe = tiny_recipe(
        tmp_path,
        *(*SMALL, f"train.remat={remat}", "train.accumulation_steps=2", "train.compute_dtype=bfloat16"),
        f"parallel.fsdp_shards={shards}",
        *("model.tie_embeddings=false", "model.vocab_size=260", "model.num_layers=4", "model.num_kv_heads=4"),
        *(f"parallel.{axis}={size}" for axis, size in layout.sizes.items()),
    )
    compiled, closed = analyse(recipe)[0], closed_analysis(recipe, layout)
    # What remat does again of an idle stage's last layer depends on how it is written.
    exact = 0.03 if layout.pipeline > 1 else 1e-12
    assert closed.flops == pytest.approx(compiled.flops, rel=exact)
    attention = [sum(m.flops for m in a.matmuls if m.attention) for a in (closed, compiled)]
    assert attention[0] == pytest.approx(attention[1], rel=exact)

    def by_axes(analysis):
        found = {}
        for transfer in analysis.transfers:
            found[transfer.axes] = found.get(transfer.axes, 0) + transfer.bytes * transfer.times
        return found

    theirs, ours = by_axes(compiled), by_axes(closed)
    # Of a stage's (here two) layers, the first one's weights are gathered once for all microbatches.
    near = 0.1 if layout.pipeline == 1 else 0.2
    for axes, size in ours.items():
        assert size == pytest.approx(theirs[axes], rel=near), axes


def test_memory_by_formula_grows_with_what_is_saved(tmp_path):
    topology = load_topology("trn2.3xlarge")
    totals = []
    for remat in ("full", "dots", "none"):
        recipe = tiny_recipe(tmp_path, *SMALL, f"train.remat={remat}", "model.num_layers=8")
        totals.append(sum(closed_memory(recipe, Layout(fsdp=4), topology).values()))
    assert totals == sorted(totals)
    assert len(set(totals)) == 3


def test_memory_by_formula_has_the_state_twice_without_donation(tmp_path):
    topology, layout = load_topology("trn2.3xlarge"), Layout(fsdp=4)
    donated, kept = (
        closed_memory(tiny_recipe(tmp_path, *SMALL, f"backend.donate={donate}"), layout, topology)
        for donate in ("true", "false")
    )
    assert kept.pop("state_out") == sum(state_bytes(tiny_recipe(tmp_path, *SMALL), layout).values()) > 0
    assert kept == donated


def test_a_pareto_set_is_one():
    points = [(3, 1), (1, 3), (2, 2), (2, 3), (3, 3), (1, 4), (2, 2)]
    assert pareto(points, lambda p: p) == [(1, 3), (2, 2), (3, 1)]


def test_what_is_found(found):
    _, found = found
    assert found.own is not None
    assert any(made is found.own for _, made in found.plans)
    candidate, made = found.winner
    assert made.time.seconds == min(plan.time.seconds for _, plan in found.fitting)
    for plan in (plan for _, plan in found.pareto):
        for _, other in found.fitting:
            faster, smaller = other.time.seconds < plan.time.seconds, other.memory.total < plan.memory.total
            assert not (faster and other.memory.total <= plan.memory.total)
            assert not (smaller and other.time.seconds <= plan.time.seconds)
    text = str(found)
    assert "Pareto" in text
    assert str(candidate) in text
    assert "nothing here was measured" in text
    assert f"{found.survey.legal:,} legal candidates" in text
    assert found.to_json()["winner"]["step_time_seconds"] == made.time.seconds


def test_the_written_recipe_is_the_winner(found, tmp_path):
    directory, found = found
    file = tmp_path / "best.yaml"
    write_winner(found, directory / "recipe.yaml", file)
    assert file.read_text().count("extends: ") == 1
    written = load_recipe(file)
    assert settings(written) == settings(found.winner[0].recipe)
    assert written == found.winner[0].recipe.model_copy(update={"name": "tiny-planned"})  # overrides and all


def test_nothing_is_written_where_the_recipe_is_the_best(found, tmp_path, monkeypatch):
    directory, found = found
    kept = replace(found, own=found.winner[1])
    assert kept.unchanged
    assert "the recipe as it is" in str(kept)
    monkeypatch.setattr("trainfw.planning.survey", lambda *_: kept.survey)
    monkeypatch.setattr("trainfw.planning.search_layouts", lambda *_, **__: kept)
    file = tmp_path / "best.yaml"
    arguments = ["plan", str(directory / "recipe.yaml"), *SMALL, "--search", "--out", str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "the recipe as it is is the best found; nothing is written" in done.stderr
    assert not file.exists()


def test_what_an_extension_cannot_say_is_written_in_full(found, tmp_path):
    _directory, found = found
    path = write_recipe(tmp_path, hardware={"topology": "trn2.3xlarge", "parameters": {"chip.hbm_size": "1 GiB"}})
    assert load_recipe(path).hardware.parameters != found.survey.recipe.hardware.parameters == {}
    write_winner(found, path, tmp_path / "best.yaml")
    assert "extends: " not in (tmp_path / "best.yaml").read_text()
    assert load_recipe(tmp_path / "best.yaml").hardware.parameters == {}


def test_files_are_not_overwritten_without_saying(tmp_path):
    recipe = write_recipe(tmp_path)
    there = tmp_path / "there.yaml"
    check_out(there, recipe, named=False)
    there.write_text("mine")
    with pytest.raises(UserError, match="already there"):
        check_out(there, recipe, named=False)
    check_out(there, recipe, named=True)
    with pytest.raises(UserError, match="the recipe itself"):
        check_out(recipe, recipe, named=True)
    with pytest.raises(UserError, match="a directory that exists"):
        check_out(tmp_path / "no" / "file.yaml", recipe, named=True)
    assert str(default_out(load_recipe(recipe))) == "tiny-planned.yaml"


def test_what_does_not_fit_does_not_win(tmp_path):
    # 64 MiB a core, less what the runtime takes.
    recipe = tiny_recipe(tmp_path, *SMALL, "hardware.parameters={chip.hbm_size: 0.001 GiB}")
    result = search_layouts(survey(recipe), most=1, limit=0)
    assert result.plans
    assert result.winner is None
    assert not result.pareto
    assert "does not fit" in str(result)


def sized(made, part):
    """`made` of a core whose memory it takes `part` of."""
    return replace(made, memory=replace(made.memory, capacity=int(made.memory.total / part)))


def test_a_winner_has_memory_to_spare(found):
    _, found = found
    best, other = found.plans[:2]
    tight = replace(found, plans=((best[0], sized(best[1], 0.97)), (other[0], sized(other[1], 0.9))), own=None)
    assert tight.winner[0] is other[0]
    assert [candidate for candidate, _ in tight.pareto] == [other[0]]
    assert str(tight).count("(fits, with less than 5% to spare)") == 1
    said = [(row["fits"], row["fits_with_room"]) for row in tight.to_json()["compiled"]]
    assert said == [(True, False), (True, True)]
    none = replace(found, plans=((best[0], sized(best[1], 0.97)),), own=None)
    assert none.winner is None
    assert "no winner" in str(none)


def test_unrolled_programs_that_compute_little_again_are_compiled(found):
    _, found = found
    unrolled = {c.recipe.train.remat for c, _ in found.plans if not c.recipe.train.scan_layers}
    assert {"none", "dots"} <= unrolled


def test_what_there_is_no_time_for_is_counted(tmp_path):
    result = search_layouts(survey(tiny_recipe(tmp_path, *SMALL)), most=1, limit=0)
    assert [made for _, made in result.plans] == [result.own]
    assert result.out_of_time >= 3  # the best scanned, the best two unrolled
    assert f"{result.out_of_time} not compiled for lack of time" in str(result)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_scan_takes_time_to_stack_what_is_kept(tmp_path, remat):
    streamed = {}
    for scan in (True, False):
        recipe = tiny_recipe(tmp_path, *SMALL, f"train.remat={remat}", f"train.scan_layers={str(scan).lower()}")
        streamed[scan] = {s.kind: s.bytes for s in closed_analysis(recipe, Layout(fsdp=4)).streamed}
    assert streamed[True]["model"] > streamed[False]["model"]
    assert streamed[True]["attention"] > streamed[False]["attention"]
    assert streamed[True]["update"] == streamed[False]["update"]


def run(*arguments):
    code = "import sys; from trainfw.cli import main; sys.argv[0] = 'trainfw'; main()"
    return subprocess.run([sys.executable, "-c", code, "plan", *arguments], capture_output=True, text=True)


def test_bad_options_exit_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (
            ("quickstart", "--search", "--objective", "speed"),
            ("objective = speed (--objective)", "one of: time, cost, memory"),
        ),
        (("quickstart", "--objective", "memory"), ("go with --search",)),
        (("quickstart", "--search"), ("hardware.topology", "a search needs hardware")),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())
    assert "--search" in CliRunner().invoke(app, ["plan", "--help"]).output
