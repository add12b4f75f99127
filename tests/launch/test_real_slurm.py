"""A job under a real Slurm, of one node: preempted, it saves, requeues itself and goes on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import losses, write_recipe

SCRIPT = Path(__file__).parent / "slurm.sh"

pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("slurmctld") is None,
        reason="needs root and Debian's slurm-wlm: tests/launch/slurm.sh install",
    ),
]


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(reached, seconds=300):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    directory = tmp_path / "slurm"
    monkeypatch.setenv("SLURM_CONF", str(directory / "slurm.conf"))
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        monkeypatch.delenv(name)  # these tests may themselves run in a job
    command = ["bash", str(SCRIPT), "start", str(directory), *free_ports(2)]
    started = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60)
    try:
        if started.returncode:
            pytest.skip(f"Slurm's daemons do not start here: {started.stderr}")
        until(lambda: "idle" in said("sinfo", "-h", "-o", "%T"))
        yield
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False)
        subprocess.run(["bash", str(SCRIPT), "stop", str(directory)], check=True)


def said(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.long
def test_a_job_is_preempted_and_goes_on(slurm, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 600}, checkpoint={"every": 0})
    run, trainfw = tmp_path / "run", [sys.executable, "-m", "trainfw"]
    launch = [*trainfw, "launch", "slurm", str(recipe), "parallel.data=2", "--nodes", "1", "--tasks-per-node", "2"]
    output = said(*launch, "--devices", "1", "--run-dir", str(run))
    assert output.startswith("job ")
    job = output.split()[1]
    rank, story = run / "logs" / "rank-0.log", run / "logs" / f"slurm-{job}.log"
    until(lambda: (run / "metrics.jsonl").exists() and '"step": 30,' in (run / "metrics.jsonl").read_text())
    assert said("squeue", "-h", "-o", "%i %T") == f"{job} RUNNING\n"
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: "exit code 143; requeued" in story.read_text())
    until(lambda: "start 2" in story.read_text())
    assert said("squeue", "-h", "-o", "%i %T") == f"{job} RUNNING\n"
    until(lambda: not said("squeue", "-h", "-o", "%i %T"))
    assert story.read_text().rstrip().endswith("exit code 0")
    assert "stopped by SIGTERM at step " in rank.read_text()
    assert f"resumed {run} at step " in rank.read_text()
    assert "done: step 600, saved in " in rank.read_text()
    assert list(losses(run)) == list(range(1, 601))
    # As if nothing had happened.
    straight = tmp_path / "straight"
    local = [*trainfw, "launch", "local", str(recipe), "parallel.data=2", "--run-dir", str(straight)]
    subprocess.run(local, check=True, capture_output=True)
    assert losses(run) == losses(straight)


def test_a_job_that_is_cancelled_stays_so(slurm, tmp_path):
    """Its processes save, and it does not requeue itself."""
    recipe = write_recipe(tmp_path, train={"steps": 100_000}, checkpoint={"every": 0})
    run = tmp_path / "run"
    job = said(sys.executable, "-m", "trainfw", "launch", "slurm", str(recipe), "--devices", "1", "--run-dir", str(run))
    number = job.split()[1]
    until(lambda: (run / "metrics.jsonl").exists() and '"step": 30,' in (run / "metrics.jsonl").read_text())
    subprocess.run(["scancel", number], check=True)
    until(lambda: not said("squeue", "-h", "-o", "%i %T"))
    story = (run / "logs" / f"slurm-{number}.log").read_text()
    assert "start 2" not in story
    assert story.rstrip().endswith("exit code 143; cancelled")
    assert "CANCELLED" in said("scontrol", "show", "job", number)
    assert "stopped by SIGTERM at step " in (run / "logs" / "rank-0.log").read_text()
