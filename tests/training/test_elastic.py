"""On fewer and more devices and processes, a run reads the same examples in the same order."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.chaos import WATCHED, rows
from tests.helpers import losses, write_recipe
from trainfw.launch import launch_local

STEPS = 100


def train(directory, recipe, devices, processes, *overrides, kill_at=None):
    """To the end; or until it is killed, once it has logged step `kill_at`."""
    directory.mkdir(exist_ok=True)
    (directory / "watched.py").write_text(WATCHED)
    run = directory / "run"
    command = [sys.executable, str(directory / "watched.py"), "train", str(recipe), *overrides]
    command += ["--devices", str(devices // processes), "--run-dir", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        (directory / "rows").mkdir(exist_ok=True)
        patch.setenv("ROWS", f"{directory / 'rows'}/")
        if processes > 1:
            assert launch_local(command, processes, directory / "logs") == 0
            return
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        metrics = run / "metrics.jsonl"
        while kill_at is not None and process.poll() is None:
            if metrics.exists() and f'"step": {kill_at},' in metrics.read_text():
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        assert process.wait() == (0 if kill_at is None else -signal.SIGKILL), (directory / "log").read_text()


@pytest.mark.long
def test_the_examples_are_those_of_the_uninterrupted_run(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": STEPS}, checkpoint={"every": 7})
    train(tmp_path / "straight", recipe, 4, 1, "parallel.fsdp=4")
    moved = tmp_path / "moved"
    train(moved, recipe, 4, 1, "parallel.fsdp=4", kill_at=20)
    train(moved, recipe, 2, 1, "parallel.data=2", kill_at=40)
    train(moved, recipe, 8, 1, "parallel={fsdp: 4, tensor: 2}", kill_at=60)
    train(moved, recipe, 2, 2, "parallel.data=2")
    expected, found = rows(tmp_path / "straight" / "rows"), rows(moved / "rows")
    trained = range(STEPS * 8)  # and what was read ahead
    assert [found[i] for i in trained] == [expected[i] for i in trained]
    straight, elastic = (losses(tmp_path / name / "run") for name in ("straight", "moved"))
    assert list(straight) == list(elastic) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(straight.values()), list(elastic.values()), rtol=1e-4)
    # The kills cost the time until the next session began (and what was done after the last checkpoint, if anything).
    log = (moved / "logs" / "rank-0.log").read_text()
    assert re.search(r"goodput \d+\.\d% of .* in 4 sessions: start .*, restart \d", log)
    kept = [json.loads(line).get("goodput") for line in (moved / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < share < 1 for share in kept if share is not None)
