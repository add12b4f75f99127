"""benchmarks/plan_accuracy.py, as typed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_accuracy.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # or the script would set it for other tests
    spec = importlib.util.spec_from_file_location("plan_accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_runs_are_fitted_by_the_rule(script):
    """Of every table and family the smallest model on the fewest chips; and what is fitted is no longer unseen."""
    tables = defaultdict(list)
    for run in script.RUNS:
        recipe = run.recipe()
        family = str(run.settings["model.preset"]).partition("-")[0].partition(".")[0]
        size = recipe.model.num_layers * recipe.model.hidden_size
        tables[run.name.split()[0], run.source, family].append((size, recipe.hardware.load().chips, run))
    for (table, *_), runs in tables.items():
        least = min((size, chips) for size, chips, _ in runs)
        for size, chips, run in runs:
            assert run.fit == ((size, chips) == least and table != "torchtitan"), run.name
            assert not (run.fit and run.unseen), run.name


def test_a_spread_counts_from_its_middle_and_its_nearer_end(script):
    run = next(run for run in script.RUNS if run.name == "MaxText Llama 2 70B, 64 GPUs")
    assert run.middle == pytest.approx((6.999 * 7.908) ** 0.5)
    assert script.nearer(run, 7.5) == 0
    assert script.nearer(run, 6.0) == pytest.approx(6.0 / 6.999 - 1)
    assert script.nearer(run, 9.0) == pytest.approx(9.0 / 7.908 - 1)
    rate = next(run for run in script.RUNS if run.unit == "seq/s")
    assert script.nearer(rate, 80.0) == pytest.approx(min(rate.published) / 80.0 - 1)


def test_a_name_of_no_run_is_refused():
    ran = subprocess.run([sys.executable, SCRIPT, "Llama", "nosuch"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "nosuch: no run's name contains this; the runs are " in ran.stderr
    assert not ran.stdout
