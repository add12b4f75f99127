"""The host holds a small part of a checkpoint at a time; `benchmarks/import_memory.py` shows the same at 3 GB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainfw

ROOT = Path(trainfw.__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_loading_and_importing_stay_within_the_bound():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "import_memory.py"), "--gigabytes", "0.12"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("within 1.3") == 2
