"""The example script beside the recipes runs as it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_recipe


@pytest.mark.slow
def test_the_custom_loop_runs(tmp_path):
    script = Path(__file__).parent.parent / "recipes" / "custom_loop.py"
    output = subprocess.run(
        [sys.executable, str(script), str(write_recipe(tmp_path)), "train.steps=4"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "step 4: loss" in output
    assert "import " in output.splitlines()[-1]
