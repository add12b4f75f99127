"""The launcher alone: its processes are a few lines each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import write_recipe
from trainfw import UserError
from trainfw.launch import launch_local
from trainfw.signals import STOPS, heeded

# Of these tests' process, which has JAX's threads; the command's has none.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork.* was called")

RANK = """
import json, os, pathlib, signal, subprocess, sys, time
rank, launcher, pids = int(os.environ["TRAINFW_PROCESS_INDEX"]), os.getppid(), pathlib.Path(sys.argv[1])
def leave(signum, frame): sys.exit(128 + signum)
def wait():
    while True: signal.pause()
def ready(*more):
    (pids / f"{rank}.tmp").write_text(json.dumps([os.getpid(), *more]))
    (pids / f"{rank}.tmp").rename(pids / f"{rank}.json")
def all_ready():
    while len(list(pids.glob("*.json"))) < 2: time.sleep(0.01)
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU):
    signal.signal(signum, leave)
"""
ONE_IS_STOPPED = "ready(); all_ready(); sys.exit(143) if rank else wait()"
ONE_FAILS_FOR_IT = "ready(); all_ready(); sys.exit(75 if rank == 0 else 143)"
LAUNCHER_HEARS = "ready(); all_ready(); rank or os.kill(launcher, {signum}); wait()"
HELD = """
signal.signal(signal.SIGTERM, signal.SIG_IGN) if {deaf} else None
ready(subprocess.Popen(["sleep", "600"]).pid) if rank else ready()
if rank == 0:
    all_ready()
    os.kill(json.loads((pids / "1.json").read_text())[0], signal.SIGSTOP)
    os.kill(launcher, signal.SIGTERM)
wait()
"""


@pytest.mark.usefixtures("sighup_is_heard")
@pytest.mark.parametrize(
    ("code", "ends"),
    [
        (ONE_IS_STOPPED, 143),
        (ONE_FAILS_FOR_IT, 143),
        *((LAUNCHER_HEARS.format(signum=int(signum)), 128 + signum) for signum in STOPS),
        (HELD.format(deaf=False), 143),
        (HELD.format(deaf=True), 143),
    ],
    ids=["one", "one, and the other fails", *(signum.name for signum in STOPS), "held", "held and deaf"],
)
def test_all_leave_in_time_with_what_they_started(code, ends, tmp_path):
    said: list[str] = []
    before = [signal.getsignal(signum) for signum in STOPS]
    began = time.monotonic()
    assert launch_local([sys.executable, "-c", RANK + code, str(tmp_path)], 2, tmp_path, said.append, 1.0) == ends
    assert time.monotonic() - began < 20
    assert [signal.getsignal(signum) for signum in STOPS] == before
    pids = [pid for rank in range(2) for pid in json.loads((tmp_path / f"{rank}.json").read_text())]
    while any(map(alive, pids)):  # of SIGKILL, in a moment
        assert time.monotonic() - began < 20
    deaf = "processes 0, 1 of 2 did not leave within 1 s of the signal and were ended"
    assert (deaf in said) == ("SIG_IGN) if True" in code)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("sighup_is_heard")
def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in heeded()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in heeded()


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """What would be started by `launch local`, and where its logs would be."""
    found: list[tuple[list[str], Path]] = []
    monkeypatch.setattr("trainfw.launch.launch_local", lambda command, _, logs, *rest: found.append((command, logs)))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return found


def test_a_run_directory_is_where_train_finds_it(launched, tmp_path, capsys):
    from trainfw.cli import launch

    launch.local("quickstart", run_dir="~/x")
    assert (launched[0][0][launched[0][0].index("--run-dir") + 1], launched[0][1]) == (
        str(tmp_path / "x"),
        tmp_path / "x" / "logs",
    )
    launch.slurm("quickstart", run_dir="~/x", dry_run=True)
    assert f"--run-dir {tmp_path}/x" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"checkpoints cannot be kept under a name with '\['"):
        launch.local("quickstart", run_dir="a[1]")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_begins_with_a_dash_is_no_option(launched, tmp_path):
    from trainfw.cli import launch

    write_recipe(tmp_path).rename(tmp_path / "-r.yaml")
    launch.local("-r.yaml")
    assert "./-r.yaml" in launched[0][0]
    assert "-r.yaml" not in launched[0][0]


def test_a_modules_name_in_the_working_directory_is_nothing_to_the_processes(tmp_path, monkeypatch):
    from trainfw.cli import launch

    commands: list[list[str]] = []
    monkeypatch.setattr("trainfw.launch.launch_local", lambda command, *_: commands.append(command) or 0)
    monkeypatch.chdir(tmp_path)
    launch.local("quickstart")
    for name in ("yaml", "random", "trainfw"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(99)")
    (command,) = commands
    script = command[: command.index("trainfw") + 1]
    assert subprocess.run([*script, "recipe", "list"], stdout=subprocess.DEVNULL).returncode == 0
