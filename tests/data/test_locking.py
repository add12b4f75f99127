from __future__ import annotations

import fcntl
import logging
import signal
import subprocess
import sys
import threading

import pytest

from trainfw.data import locking
from trainfw.data.locking import held
from trainfw.errors import PeerError

STOPS = """
import os, signal, sys
from pathlib import Path
from trainfw.data.locking import held
with held(Path(sys.argv[1]), "a test"):
    print(flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"POLL_SECONDS": 0.01, "SAY_SECONDS": 0.05, "BEAT_SECONDS": 0.05}.items():
        monkeypatch.setattr(locking, name, seconds)
    monkeypatch.setattr(locking, "SILENT_SECONDS", 0.5)


def test_who_works_is_waited_for_and_named(tmp_path, quick, caplog):
    file, seen, moves = tmp_path / "a.lock", [], iter(range(1000))
    holder = file.with_suffix(".holder")

    def progress(text: str, seconds: int, total: int | None) -> None:
        seen.append(text)
        if len(seen) > 100:  # far longer than nothing may happen
            fcntl.flock(other, fcntl.LOCK_UN)

    def write() -> None:
        new = tmp_path / "new"
        new.write_text(f"process 7 on another\n{next(moves)}")
        new.replace(holder)

    def work() -> None:
        while not done.wait(0.01):
            write()

    done = threading.Event()
    worker = threading.Thread(target=work)
    with file.open("w") as other, caplog.at_level(logging.WARNING, "trainfw"):
        fcntl.flock(other, fcntl.LOCK_EX)
        write()
        worker.start()
        with held(file, "the cache", progress):
            done.set()
            worker.join()
    assert set(seen) == {"Waiting for the cache: seconds"}
    assert caplog.messages == [f"the cache: waiting for process 7 on another, which holds {file}"]
    with held(file, "the cache"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_who_is_stopped_is_not_waited_for_and_who_is_dead_holds_nothing(tmp_path, quick):
    file = tmp_path / "a.lock"
    process = subprocess.Popen([sys.executable, "-c", STOPS, str(file)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        said = rf"the cache: process {process.pid} on .* holds .*a\.lock and has done nothing for 0.5 s: it is stopped"
        with pytest.raises(PeerError, match=said), held(file, "the cache"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with held(file, "the cache"):
        assert "on" in file.with_suffix(".holder").read_text()
