from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from trainfw.errors import UserError

_STACKS = signal.SIGUSR1
"""Asks a process for the stacks of its threads (`trainfw.cli.signals`)."""
_STACK_SECONDS = 2.0
_POLL_SECONDS = 0.1
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that was stopped, as all of them then are, each when it has saved."""
_LEAVING_SECONDS = 60.0
"""How long they are waited for."""
_TAIL_BYTES = 2**16
"""Of a log, where the lines are that are shown."""


def launch_local(
    command: Sequence[str], processes: int, logs: Path, say: Callable[[str], None] = lambda text: None
) -> int:
    """Run `command` in `processes` processes of this machine, which find each other; their exit code.

    Each adds to `logs/rank-K.log`; what the first writes is shown as well. The first that fails ends the rest, whose
    stacks go to their logs, and is the one reported. SIGINT and SIGTERM go to all of them; a second SIGINT ends them.
    Raises UserError for a number of processes that cannot be.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: expected at least 1")
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        port = _free_port()
        paths = [logs / f"rank-{rank}.log" for rank in range(processes)]
        files = [stack.enter_context(path.open("ab", buffering=0)) for path in paths]
        say(f"{processes} processes; their logs: {logs}/rank-*.log")
        shown = paths[0].stat().st_size
        children = [_start(command, rank, processes, port, file) for rank, file in enumerate(files)]
        stack.callback(_end, children)
        over = threading.Event()
        echo = threading.Thread(target=_echo, args=(paths[0], shown, over), daemon=True)
        echo.start()
        with _forwarding(children) as forwarded:
            rank = _first_to_fail(children, forwarded)
        over.set()
        echo.join()  # before the others are ended, whose stacks are for their logs
        if rank is None:
            return 0
        code = children[rank].returncode
        code = 128 - code if code < 0 else code
        late = any(child.poll() is None for child in children)
        if not forwarded and (late or code not in _STOPPED):
            _end(children)
            say(f"process {rank} of {processes} ended first, with exit code {code}; the others were ended")
            if rank:  # what the first one wrote was shown
                say(f"{paths[rank]} ends:\n{_tail(paths[rank])}")
        return code


def _start(command: Sequence[str], rank: int, processes: int, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "TRAINFW_PROCESS_COUNT": str(processes),
        "TRAINFW_PROCESS_INDEX": str(rank),
        "TRAINFW_COORDINATOR": f"localhost:{port}",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes through us alone
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: whoever kills us leaves none of them behind


def _first_to_fail(children: Sequence[subprocess.Popen[bytes]], forwarded: Sequence[int]) -> int | None:
    """The rank of the first process that fails; None where all end well. After a signal, waits for all of them."""
    failed: int | None = None
    deadline = math.inf
    while True:
        codes = [child.poll() for child in children]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None and codes[failed] in _STOPPED:
                deadline = time.monotonic() + _LEAVING_SECONDS
        if None not in codes:
            return failed
        if failed is not None and not forwarded and (codes[failed] not in _STOPPED or time.monotonic() > deadline):
            return failed
        time.sleep(_POLL_SECONDS)


@contextmanager
def _forwarding(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Signals that came, each passed on; a second SIGINT kills."""
    received: list[int] = []

    def handle(signum: int, _frame: object) -> None:
        received.append(signum)
        for child in children:
            if child.poll() is None:
                child.send_signal(signum if len(received) == 1 or signum != signal.SIGINT else signal.SIGKILL)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """At once, but for the moment it takes them to say where they were."""
    left = [child for child in children if child.poll() is None]
    for child in left:
        for signum in (_STACKS, signal.SIGCONT):
            with suppress(ProcessLookupError):
                child.send_signal(signum)
    deadline = time.monotonic() + _STACK_SECONDS
    while time.monotonic() < deadline and any(child.poll() is None for child in left):
        time.sleep(_POLL_SECONDS)
    for child in left:
        child.kill()
        child.wait()


def _echo(log: Path, start: int, over: threading.Event) -> None:
    """What is added to a log from byte `start` on, until it is over."""
    with log.open("rb") as file:
        file.seek(start)
        last = False
        while not last:
            last = over.wait(_POLL_SECONDS)
            with suppress(OSError):  # nobody reads any more; the run goes on
                sys.stdout.buffer.write(file.read(max(os.fstat(file.fileno()).st_size - file.tell(), 0)))  # no device's
                sys.stdout.buffer.flush()


def _tail(path: Path, lines: int = 15) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        text = file.read(_TAIL_BYTES) if path.is_file() else b""
    return "\n".join(text.decode("utf-8", "replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
