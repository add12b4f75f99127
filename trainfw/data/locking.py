"""Lock between processes: it names the process that it waits for, and gives up on one that hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trainfw.data.progress import Progress
from trainfw.errors import PeerError, UserError

POLL_SECONDS = 0.2
SAY_SECONDS = 3.0
BEAT_SECONDS = 2.0
SILENT_SECONDS = 300.0
"""Seconds without work of a lock's holder after which the others stop waiting."""
_BUSY_SECONDS = 0.01
"""Least processor time (seconds) that a working process uses between two beats."""


@contextlib.contextmanager
def held(file: Path, what: str, progress: Progress | None = None) -> Iterator[None]:
    """Hold the lock of `file`, once any other process that holds it is done.

    A process that has ended holds no lock. Raises PeerError, with its name, for a holder that has done nothing for
    `SILENT_SECONDS` (it is stopped, or hangs), and UserError where the file system has no locks.

    Args:
        what: the thing that the lock protects, in words.
    """
    lock, holder = FileLock(file), file.with_suffix(".holder")
    _acquire(lock, holder, what, progress)
    try:
        with _beating(holder):
            yield
    finally:
        lock.release()


def _acquire(lock: FileLock, holder: Path, what: str, progress: Progress | None) -> None:
    waited = silent = 0.0
    warned, last, checked = False, "", time.monotonic()
    while True:
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            time.sleep(POLL_SECONDS)
        except NotImplementedError as error:
            raise UserError(f"{lock.lock_file}: this file system has no locks") from error
        now = time.monotonic()
        gap, checked = min(now - checked, 2 * POLL_SECONDS), now  # this process may have been stopped itself
        try:  # the holder's name, and a number that grows while it works
            beat = holder.read_text(encoding="utf-8", errors="replace")
        except OSError:
            beat = ""
        waited, silent = waited + gap, silent + gap if beat == last else 0.0
        if beat != last and progress is not None:
            progress(f"Waiting for {what}: seconds", int(waited), None)
        last = beat
        owner = beat.partition("\n")[0] or "another process"
        if waited > SAY_SECONDS and not warned:
            warned = True
            logging.getLogger("trainfw").warning("%s: waiting for %s, which holds %s", what, owner, lock.lock_file)
        if silent > SILENT_SECONDS:
            raise PeerError(
                f"{what}: {owner} holds {lock.lock_file} and has done nothing for {SILENT_SECONDS:g} s: it is "
                "stopped, or hangs; let it go on, or end it"
            )


@contextlib.contextmanager
def _beating(holder: Path) -> Iterator[None]:
    """Keep writing this process's name and processor time to the file `holder`, while it works."""
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    ended = threading.Event()

    def write(seconds: float) -> None:
        with contextlib.suppress(OSError):  # the work itself will tell of a disk that is full
            temporary = holder.with_suffix(".beat")
            temporary.write_text(f"{owner}\n{seconds:.2f}", encoding="utf-8")
            temporary.replace(holder)

    def beat() -> None:
        before = time.process_time()
        while not ended.wait(BEAT_SECONDS):
            if (now := time.process_time()) - before > _BUSY_SECONDS:
                write(now)
                before = time.process_time()

    write(time.process_time())
    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            holder.unlink()
