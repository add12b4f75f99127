"""benchmarks/plan_accuracy.py, as typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_accuracy.py"


def test_a_name_of_no_run_is_refused():
    ran = subprocess.run([sys.executable, SCRIPT, "Llama", "nosuch"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "nosuch: no run's name contains this; the runs are " in ran.stderr
    assert not ran.stdout
