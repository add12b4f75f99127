"""A few of the stops of `benchmarks/chaos.py`, of which the whole takes most of an hour.

Of one process; tests/launch/ stops one of two.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import COMPILED_QUICKLY

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.long
def test_a_few_runs_are_stopped_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", COMPILED_QUICKLY)  # without these tests' own devices
    command = [sys.executable, str(CHAOS), "--runs", "1", "--terms", "1", "--seed", "11", "--grace", "60"]
    command += ["--processes", "1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("2 of 2 runs went on bit for bit\n")
