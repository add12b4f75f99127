"""On fewer and more devices and processes, a run reads the same examples in the same order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import losses, write_recipe
from trainfw.launch import launch_local

pytestmark = pytest.mark.slow

# `trainfw`, but each row that is trained on is written down with its place in the run's order.
WATCHED = """
import hashlib, json, os, sys
from trainfw import backends
from trainfw.cli import main

connect = backends.connect

def connect_and_watch(wiring):
    connect(wiring)  # before anything touches a device
    from trainfw.data import TrainIterator

    take = TrainIterator._take
    TrainIterator._take = lambda self: watched(self, take)

def watched(self, take):
    first, batch = self._next_row, take(self)
    share = len(batch["tokens"])
    with open(os.environ["ROWS"] + str(os.getpid()), "a") as file:
        for i, tokens in enumerate(batch["tokens"]):
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
            print(json.dumps([first + self._process_index * share + i, digest]), file=file)
    return batch

backends.connect = connect_and_watch
main()
"""


def rows(directory: Path) -> dict[int, str]:
    """Digest by place; a row that was read twice must be the same."""
    found: dict[int, str] = {}
    for file in directory.glob("rows-*"):
        for line in file.read_text().splitlines():
            place, digest = json.loads(line)
            assert found.setdefault(place, digest) == digest
    return found


def train(directory, recipe, steps, devices, processes, *overrides):
    directory.mkdir(exist_ok=True)
    (directory / "watched.py").write_text(WATCHED)
    command = [sys.executable, str(directory / "watched.py"), "train", str(recipe), f"train.steps={steps}", *overrides]
    command += ["--devices", str(devices // processes), "--run-dir", str(directory / "run")]
    environment = {"ROWS": str(directory / "rows-")}
    if processes == 1:
        ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWS", environment["ROWS"])
        assert launch_local(command, processes, directory / "logs") == 0


def test_the_examples_are_those_of_the_uninterrupted_run(tmp_path):
    recipe = write_recipe(tmp_path, checkpoint={"every": 5}, optimizer={"schedule": "constant", "warmup_steps": 2})
    train(tmp_path / "straight", recipe, 24, 4, 1, "parallel.fsdp=4")
    moved = tmp_path / "moved"
    train(moved, recipe, 6, 4, 1, "parallel.fsdp=4")
    train(moved, recipe, 12, 2, 1, "parallel.data=2")
    train(moved, recipe, 18, 8, 1, "parallel={fsdp: 4, tensor: 2}")
    train(moved, recipe, 24, 2, 2, "parallel.data=2")
    expected, found = rows(tmp_path / "straight"), rows(moved)
    trained = range(24 * 8)  # and what was read ahead
    assert [found[i] for i in trained] == [expected[i] for i in trained]
    straight, elastic = (losses(tmp_path / name / "run") for name in ("straight", "moved"))
    assert list(straight) == list(elastic)
    np.testing.assert_allclose(list(straight.values()), list(elastic.values()), rtol=1e-4)
