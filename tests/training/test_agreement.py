"""Processes of one run that are not alike end before the first step, in words."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import in_two_processes, tiny_recipe, write_recipe
from trainfw.training import agreement
from trainfw.training.agreement import difference, recipe_facts

RECIPE = {"train.steps": 8, "model.moe": None, "data.seed": 1}
FACTS = {"code": {"jax": "1.0"}, "recipe": RECIPE}
SAME_RECIPE, SAME_CODE = "all processes of a run take the same recipe", "all processes of a run run the same code"
DIFFERENCES = {
    "value": ({"recipe": RECIPE | {"train.steps": 9}}, f"train.steps = 9, process 0 has 8: {SAME_RECIPE}"),
    "type": ({"recipe": RECIPE | {"data.seed": 1.0}}, f"data.seed = 1.0, process 0 has 1: {SAME_RECIPE}"),
    "more": ({"code": {"jax": "1.0", "optax": "2"}}, f"optax = '2', process 0 has no optax: {SAME_CODE}"),
    "less": ({"code": {}}, f"no jax, process 0 has '1.0': {SAME_CODE}"),
    "none": (
        {"recipe": {"train.steps": 8, "data.seed": 1}},
        f"no model.moe, process 0 has None: {SAME_RECIPE}",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_first_difference_is_named(name):
    other, expected = DIFFERENCES[name]
    assert difference([FACTS, FACTS, FACTS | other]) == f"process 2 of 3 has {expected}"


VALUES = st.none() | st.booleans() | st.integers(0, 2) | st.floats(allow_nan=False) | st.text(max_size=2)
SAID = st.fixed_dictionaries(
    {section: st.dictionaries(st.sampled_from("abc"), VALUES) for section in ("code", "recipe", "data")}
)


@given(st.lists(SAID, min_size=1, max_size=4))
def test_there_is_a_difference_where_processes_differ(said):
    texts = [json.dumps(one, sort_keys=True) for one in said]
    odd = [index for index, text in enumerate(texts) if text != texts[0]]
    found = difference(said)
    assert found.startswith(f"process {odd[0]} of {len(said)} has ") if odd else not found


def test_what_may_differ_from_host_to_host(tmp_path, monkeypatch):
    mine = recipe_facts(tiny_recipe(tmp_path))
    same = ["data.cache_dir=/a", "data.prefetch=9", "watchdog.step_seconds=1800", f"data.source={tmp_path}/*/*.txt"]
    assert recipe_facts(tiny_recipe(tmp_path, *same)) == mine
    for other in ["train.accumulation_steps=2", "checkpoint.every=3", "watchdog.step_seconds=9", "data.seed=1"]:
        theirs = recipe_facts(tiny_recipe(tmp_path, other))
        assert difference([mine, theirs]).startswith(f"process 1 of 2 has {other.replace('=', ' = ')}, process 0 has ")
    given = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/here --xla_cpu_enable_fast_math=true {given}")
    said = "process 1 of 2 has XLA_FLAGS --xla_cpu_enable_fast_math = 'true', process 0 has no XLA_FLAGS"
    assert difference([mine, recipe_facts(tiny_recipe(tmp_path))]).startswith(said)
    monkeypatch.setattr(agreement, "_source_digest", lambda: "other")
    assert "digest of trainfw's code = 'other'" in difference([mine, recipe_facts(tiny_recipe(tmp_path))])


# Two processes, of which the second is told something else each time; at last as a command.
WORKER = """
import os, sys, time
from trainfw import backends, load_recipe
recipe, run, index = sys.argv[1], sys.argv[2], int(os.environ["TRAINFW_PROCESS_INDEX"])
backends.connect(backends.prepare(1, hardware=load_recipe(recipe).hardware))
from trainfw import UserError, cli, train
for other in sys.argv[3:]:
    overrides = [other] if index and "=" in other else []
    try:
        train(load_recipe(recipe, overrides), run_dir=other if index and "=" not in other else run)
    except UserError as error:
        print(error, flush=True)
from trainfw.cli.signals import Leaving
if index:
    end = Leaving.end
    Leaving.end = lambda self: (time.sleep(1), end(self))  # it is long in leaving: the first one waits
sys.argv[1:] = ["train", recipe, "--run-dir", run, *(["train.steps=3"] if index else [])]
cli.main()
"""


def test_two_processes(tmp_path):
    recipe = write_recipe(tmp_path, parallel={"data": 2})
    (tmp_path / "other").mkdir()
    for file in (tmp_path / "text").iterdir():
        (tmp_path / "other" / file.name).write_text(file.read_text().replace("word3", "word4"))
    run = tmp_path / "run"
    others = ["optimizer.learning_rate=2.0e-3", str(tmp_path / "elsewhere"), f"data.source={tmp_path}/none/*.txt"]
    others.append(f"data.source={tmp_path}/other/*.txt")
    both = in_two_processes(WORKER, recipe, run, *others, XDG_CACHE_HOME=str(tmp_path / "cache"))
    expected = [
        f"process 1 of 2 has optimizer.learning_rate = 0.002, process 0 has 0.003: {SAME_RECIPE}",
        f"process 1 of 2 has run directory = '{tmp_path / 'elsewhere'}', process 0 has '{run}': all processes",
        "none/*.txt",
        "process 1 of 2 has digest of the training data = ",
    ]
    for process in both:
        output, errors = process.stdout, process.stderr
        said = [line for line in output.splitlines() if "process 1 of 2" in line or "none/*" in line]
        assert [part for part in expected if not any(part in line for line in said)] == [], (output, errors)
        assert process.returncode == 2, errors
        assert f"error: process 1 of 2 has train.steps = 3, process 0 has 8: {SAME_RECIPE}\n" in errors
    assert not run.exists()
    assert not (tmp_path / "elsewhere").exists()
