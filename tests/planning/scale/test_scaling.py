"""One recipe on more and more units: what runs there, that it is the plan of it, and what failures leave."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers import tiny_recipe, write_recipe
from trainfw import UserError
from trainfw.planning import parse_counts, plan, scale_out, scaling_cores
from trainfw.planning.scale.scaling import at_count, ladder

ON_CHIPS = [
    "hardware={topology: half.yaml, count: 2, dollars_per_chip_hour: 2.0}",
    "parallel={data: 2, fsdp: 2, tensor: 2}",
    "train={steps: 1000, global_batch_size: 64, accumulation_steps: 4, compute_dtype: bfloat16}",
    "checkpoint.every=500",
]


def half(directory):
    """A recipe on hosts of four H100, of which two are as many devices as this process simulates."""
    file = directory / "half.yaml"
    dims = "[{name: gpu, size: 4, kind: switch, link: nvlink}]"
    file.write_text(f"description: four\nextends: h100-8\nchip: h100\ndims: {dims}\nsources: [me]\n")
    return tiny_recipe(directory, *(text.replace("half.yaml", str(file)) for text in ON_CHIPS))


@pytest.fixture
def recipe(tmp_path):
    return half(tmp_path)


def sizes(recipe):
    train = recipe.train
    return recipe.parallel.data, train.global_batch_size, train.accumulation_steps


def test_weak_scaling_keeps_the_rows_of_a_core(recipe):
    assert sizes(at_count(recipe, 2, strong=False)) == (2, 64, 4)
    assert sizes(at_count(recipe, 64, strong=False)) == (64, 2048, 4)
    assert sizes(at_count(recipe, 1, strong=False)) == (1, 32, 4)


def test_strong_scaling_takes_microbatches_first_and_then_rows(recipe):
    """32 rows a replica's core in 4 microbatches of 4 at 2 units."""
    found = {count: sizes(at_count(recipe, count, strong=True)) for count in (1, 2, 4, 8, 16, 32)}
    assert found == {
        1: (1, 64, 8),  # 32 rows a core: 8 of 4
        2: (2, 64, 4),
        4: (4, 64, 2),
        8: (8, 64, 1),
        16: (16, 64, 1),  # 2 rows a core
        32: (32, 64, 1),
    }
    with pytest.raises(
        UserError, match=r"64 sequences does not divide over data\(64\) \* fsdp\(2\) = 128; a .* of 128"
    ):
        at_count(recipe, 64, strong=True)
    with pytest.raises(UserError, match=r"data\(3\) \* fsdp\(2\) = 6; a train.global_batch_size of 66 would"):
        at_count(recipe, 3, strong=True)


def test_fsdp_that_spans_units_cannot_shrink(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        "hardware={topology: trn2-ultraserver, count: 4}",
        "parallel={tensor: 4}",
        "train.global_batch_size=256",
    )
    with pytest.raises(UserError, match="4 units hold 1 replica: 2 hold no whole number of them"):
        at_count(recipe, 2, strong=False)
    assert at_count(recipe, 8, strong=False).parallel.data == 2
    assert at_count(recipe, 8, strong=False).parallel.fsdp == 256


def test_a_topology_without_a_network(tmp_path):
    rungs = ladder(tiny_recipe(tmp_path, "hardware.topology=trn2.3xlarge"), (1, 4), strong=False)
    assert not isinstance(rungs[1], str)
    assert "no network joins them" in rungs[4]


def test_few_replicas_are_compiled_for_many(recipe):
    assert scaling_cores(recipe, (1, 2, 3, 64, 2048)) == 8
    assert scaling_cores(recipe, (100_000,)) == 8


SCALED = (1, 2, 3, 8)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    told = []
    return scale_out(half(tmp_path_factory.mktemp("scaling")), SCALED, told.append), told


@pytest.mark.long
def test_steps_are_compiled_once_for_each_number_of_rows(found):
    _, told = found
    # Weak: one replica, and two. Strong: 8 microbatches, 1, and those of weak scaling again where 2 units run.
    assert sum("compiling" in text for text in told) == 4


@pytest.mark.long
def test_rows_are_the_plans_of_what_runs_there(found):
    made, _ = found
    assert [row.count for row in made.weak] == [row.count for row in made.strong] == list(SCALED)
    for rows, strong in ((made.weak, False), (made.strong, True)):
        for row in rows:
            if row.plan is None:
                continue
            assert row.plan.recipe == at_count(made.recipe, row.count, strong=strong)
            assert row.plan.layout.data == row.count
            assert row.plan.placement.topology.count == row.count
    whole = plan(made.recipe)
    for row in (made.weak[1], made.strong[1]):
        assert row.plan is not None
        assert row.plan.to_json() == whole.to_json()


def test_what_does_not_divide_is_said(found):
    made, _ = found
    assert not any(row.problem for row in made.weak)
    assert [row.count for row in made.strong if row.problem] == [3]
    assert "a train.global_batch_size of 66 would" in made.strong[2].problem


def test_json_adds_up(found):
    made, _ = found
    json_ = json.loads(json.dumps(made.to_json()))
    weak, strong = json_["scaling"]["weak"], json_["scaling"]["strong"]
    assert strong[2].keys() == {"count", "problem"}
    assert weak[0]["efficiency"] == strong[0]["efficiency"] == 1
    tokens = 1000 * 64 * 32
    assert json_["scaling"]["tokens"] == tokens
    for first, row in [*((weak[0], row) for row in weak), *((strong[0], row) for row in strong)]:
        if row["problem"] is None:
            each = row["tokens_per_second"] / row["chips"]
            assert row["efficiency"] == pytest.approx(each / (first["tokens_per_second"] / first["chips"]))
            assert row["chip_hours"] == pytest.approx(tokens / each / 3600)
            assert row["dollars"] == pytest.approx(2 * row["chip_hours"])
            assert row["chip_hours_with_failures"] > row["chip_hours"]
            assert 0 < row["goodput"] < 1
    assert weak[0]["data_share"] == 0 < weak[1]["data_share"] < strong[-1]["data_share"]
    assert [row["count"] for row in json_["goodput"]["weak"]] == list(SCALED)
    assert [row["count"] for row in json_["goodput"]["strong"]] == [1, 2, 8]
    assert all(one["best_spares"] < len(one["spares"]) for one in json_["goodput"]["weak"])


@pytest.mark.long
def test_a_run_that_never_ends_is_json_all_the_same(tmp_path):
    recipe = half(tmp_path)
    parameters = {"reliability.instance_mtbf": "1 s"}
    hardware = recipe.hardware.model_copy(update={"parameters": parameters})
    found = scale_out(recipe.model_copy(update={"hardware": hardware}), [2])
    (row,) = json.loads(json.dumps(found.to_json(), allow_nan=False))["scaling"]["weak"]
    assert row["goodput"] == 0
    assert row["chip_hours_with_failures"] is row["dollars_with_failures"] is None
    assert row["chip_hours"] > 0


def test_the_text_can_be_acted_on(found):
    text = str(found[0])
    for part in ("weak: the global batch grows", "strong: the global batch stays at 64 sequences", "dollars"):
        assert part in text
    for part in ("MTBF", "interval", "one buys", "[reliability.instance_mtbf]", "419 unexpected"):
        assert part in text
    assert max(map(len, text.split("assumed of")[0].splitlines()[1:])) < 140


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("1, 4", "1,4"),
        ("1 4 16", "1,4,16"),
        ("0,4", "4,16"),
        ("1,a", "1,4,16"),
        ("1,1000000000", "1,4,16"),
        ("9" * 5000, "1,4,16"),
        ("", "1,4,16"),
        ("a", "1,4,16"),
        ("4,-1", "4,16"),
        ("1.5", "1,4,16"),
    ],
)
def test_counts_that_are_none(text, nearest):
    with pytest.raises(
        UserError, match=f"counts of units from 1 to 1,048,576 with commas between them, such as {nearest}$"
    ):
        parse_counts(text)


def test_counts():
    assert parse_counts("16,1,4,4") == (1, 4, 16)


@pytest.mark.long
def test_as_typed(tmp_path):
    recipe = str(write_recipe(tmp_path, hardware={"topology": "h100-8"}))
    command = [sys.executable, "-m", "trainfw", "plan", recipe, "--scale"]
    page = tmp_path / "plan.html"
    ran = subprocess.run([*command, "1,2", "--json", "--html", page], check=True, capture_output=True, text=True)
    document = json.loads(ran.stdout)
    assert {"step_time_seconds", "scaling", "goodput"} <= document.keys()
    assert "weak, 2:" in ran.stderr
    assert "Weak scaling" in page.read_text()
    for arguments, message in ((["1;2"], "such as 1,2"), (["1,2", "--search"], "--scale is of one layout")):
        refused = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
