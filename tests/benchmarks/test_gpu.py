from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu
    finally:
        sys.path.remove(str(BENCHMARKS))
    return gpu


def test_without_a_gpu_it_says_so(gpu):
    if gpu.card() is not None:
        pytest.skip("there is one")
    told = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True)
    assert told.returncode == 2
    assert "nvidia-smi shows no GPU" in told.stderr


def test_an_unknown_recipe_is_named(gpu, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.parse(["--recipes", "h100-13b"])
    assert ended.value.code == 2
    assert "'h100-13b'" in capsys.readouterr().err


def test_a_row_holds_the_share_of_the_peak(gpu):
    from side_by_side.driver import Record

    record = Record(seconds=[2.0, 4.0, 3.0], losses=[1.0], more=[{"device_memory": 5e9}], first_step=7.0)
    assert gpu.row("it", "us", record, 300, 6e12, 4e12) == ["it", "us", 3.0, 100.0, 2.0, 50.0, 7.0, 5.0, 1.0]
