"""Several processes of this machine train as one; what befalls one of them ends all, and is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import losses, write_recipe


def command(recipe, run, *overrides):
    launch = [sys.executable, "-m", "trainfw", "launch", "local", str(recipe), "--processes", "2"]
    return [*launch, "parallel.data=2", *overrides, "--run-dir", str(run)]


def start(*arguments):
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_step(step, process, run):
    """The ranks' process ids, once a step is logged."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(text) for text in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two processes, never stopped."""
    directory = tmp_path_factory.mktemp("two")
    recipe = write_recipe(directory, train={"steps": 40}, checkpoint={"every": 5})
    ran = subprocess.run(command(recipe, directory / "run"), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 processes; their logs: " in ran.stderr
    return recipe, losses(directory / "run"), directory / "run"


def test_every_rank_has_a_log_and_the_first_one_is_shown(straight):
    _, expected, run = straight
    assert len(expected) == 40
    logs = [(run / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert all("on 2 cpu devices (cpu) of 2 processes, layout data(2)" in log for log in logs)
    assert all("step 40/40  loss" in log for log in logs)


@pytest.mark.long
def test_one_process_goes_on_with_what_two_began(straight, tmp_path):
    recipe, expected, _ = straight
    run = tmp_path / "run"
    half = subprocess.run(command(recipe, run, "train.steps=20"), capture_output=True, text=True)
    assert half.returncode == 0, half.stdout + half.stderr
    alone = [sys.executable, "-m", "trainfw", "train", str(recipe), "--devices", "2", "parallel.data=2"]
    ran = subprocess.run([*alone, "train.steps=40", "--run-dir", str(run)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"resumed {run} at step 20" in ran.stdout
    assert list(losses(run)) == list(expected)


def saved_and_left(process, run):
    """Check that a run which was told to stop has saved its last step, and said so."""
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "saved; the same command resumes" in output
    assert max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*")) == max(losses(run))


@pytest.mark.long
def test_whatever_befalls_one_ends_all_and_all_go_on(straight, tmp_path):
    """One is killed; then one hangs; then one is told to stop."""
    recipe, expected, _ = straight
    run = tmp_path / "run"
    process = start(recipe, run)
    ranks = until_step(7, process, run)
    os.kill(ranks[1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 ended first, with exit code 137; the others were ended" in output
    assert all(map(gone, ranks))

    process = start(recipe, run, "watchdog.step_seconds=5", "watchdog.save_seconds=5")
    ranks = until_step(17, process, run)
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 20
    assert process.returncode == 75
    assert "resumed" in output
    assert "failed: nothing has moved for 5 s in phase '" in output
    assert "Thread 0x" in output
    assert "Thread 0x" in (run / "logs" / "rank-1.log").read_text()  # the one that hung, when it was ended
    assert all(map(gone, ranks))

    process = start(recipe, run, "checkpoint.every=0")
    os.kill(until_step(27, process, run)[1], signal.SIGTERM)
    saved_and_left(process, run)

    ran = subprocess.run(command(recipe, run), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "resumed" in ran.stdout
    assert losses(run) == expected


@pytest.mark.long
def test_sigterm_to_the_launcher_saves_in_all(straight, tmp_path):
    recipe, expected, _ = straight
    run = tmp_path / "run"
    process = start(recipe, run, "checkpoint.every=0")
    until_step(12, process, run)
    process.send_signal(signal.SIGTERM)
    saved_and_left(process, run)
    ran = subprocess.run(command(recipe, run), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert losses(run) == expected


@pytest.mark.long
def test_bad_input_ends_all_without_a_traceback(straight, tmp_path):
    recipe, _, run = straight
    ran = subprocess.run(command(recipe, run, "train.seed=3"), capture_output=True, text=True)
    assert ran.returncode == 2
    assert "train.seed: 0 there, 3 here" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr
    ran = subprocess.run(command(recipe, tmp_path / "run", "train.sede=3"), capture_output=True, text=True)
    assert ran.returncode == 2
    assert "did you mean 'train.seed'?" in ran.stderr
    assert not (tmp_path / "run").exists()
