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
from trainfw.signals import heeded, stop_code

_STACKS = signal.SIGUSR1
"""Signal that asks a process for the stacks of its threads (`trainfw.cli.signals`)."""
_STACK_SECONDS = 2.0
_POLL_SECONDS = 0.1
GRACE_SECONDS = 120
"""Seconds that the processes have to save and leave, once one of them, or we, were told to stop."""
_TAIL_BYTES = 2**16
"""Bytes at the end of a log, from which the lines that are shown are taken."""

Children = list[subprocess.Popen[bytes]]


def launch_local(
    command: Sequence[str],
    processes: int,
    logs: Path,
    say: Callable[[str], None] = lambda text: None,
    grace: float = GRACE_SECONDS,
    *,
    show: bool = True,
) -> int:
    """Run `command` in `processes` processes of this machine, which find each other; their exit code.

    Each adds to `logs/rank-K.log`; what the first writes is shown as well, unless `show` is false. The first that fails
    ends the rest, whose stacks go to their logs, and is the one reported. The signals that stop a run go to all of
    them, and where one of them left on such a signal, the others are told to; a second SIGINT ends them at once, and so
    do `grace` seconds that they have not left in, also those that were stopped (SIGSTOP).

    Raises UserError for a number of processes that cannot be.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: expected at least 1")
    logs.mkdir(parents=True, exist_ok=True)
    children: Children = []
    with ExitStack() as stack:
        port = _free_port()
        paths = [logs / f"rank-{rank}.log" for rank in range(processes)]
        files = [stack.enter_context(path.open("ab", buffering=0)) for path in paths]
        say(f"{processes} processes; their logs: {logs}/rank-*.log")
        shown = paths[0].stat().st_size
        stack.callback(_end, children)
        received = stack.enter_context(_forwarding(children))
        for file in files:
            if not received:
                children.append(_start(command, len(children), processes, port, file))
        for signum in received:  # while the last was being started
            _pass_on(children, signum)
        over = threading.Event()
        echo = threading.Thread(target=_echo, args=(paths[0], shown, over), daemon=True)
        if show:
            echo.start()
        rank = _first_to_fail(children, received, grace)
        over.set()
        if show:
            echo.join()  # before the others are ended, whose stacks are for their logs
        late = [str(k) for k, child in enumerate(children) if child.poll() is None]
        stopped = bool(received) or (rank is not None and stop_code(children[rank].returncode) is not None)
        _end(children)
        if stopped and late and received.count(signal.SIGINT) < 2:
            which = f"process{'es' * (len(late) > 1)} {', '.join(late)} of {processes}"
            say(f"{which} did not leave within {grace:g} s of the signal and {'were' * (len(late) > 1) or 'was'} ended")
        if rank is None:
            return 128 + received[0] if received and (late or len(children) < processes) else 0
        code = children[rank].returncode
        code = 128 - code if code < 0 else code
        if not stopped:
            say(f"process {rank} of {processes} ended first, with exit code {code}; the others were ended")
            if rank:  # what the first one wrote was shown
                say(f"{paths[rank]} ends:\n{_tail(paths[rank])}")
        return code


def _start(command: Sequence[str], rank: int, processes: int, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: whoever kills us leaves none of them behind

    environment = {
        "TRAINFW_PROCESS_COUNT": str(processes),
        "TRAINFW_PROCESS_INDEX": str(rank),
        "TRAINFW_COORDINATOR": f"localhost:{port}",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes through us alone
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )


def _first_to_fail(children: Children, received: Sequence[int], grace: float) -> int | None:
    """Return the rank of the first process that fails; None where all end well, or none that was told to leave has.

    Where a signal stopped it, or came to us, the others have `grace` seconds to leave too.
    """
    failed: int | None = None
    deadline = math.inf
    while True:
        codes = [child.poll() for child in children]
        if failed is None:
            # First one that was stopped: others may end, otherwise, because of that.
            bad = [rank for rank, code in enumerate(codes) if code]
            failed = next(iter(sorted(bad, key=lambda rank: stop_code(codes[rank] or 0) is None)), None)
        if None not in codes:
            return failed
        stopped = failed is not None and stop_code(codes[failed] or 0) is not None
        if failed is not None and not stopped and not received:
            return failed
        if (stopped or received) and deadline == math.inf:
            deadline = time.monotonic() + grace
            if not received:  # one that has heard of it already takes no notice
                _pass_on(children, signal.SIGTERM)
        if time.monotonic() > deadline or received.count(signal.SIGINT) > 1:
            return failed
        time.sleep(_POLL_SECONDS)


@contextmanager
def _forwarding(children: Children) -> Iterator[list[int]]:
    """Pass on every signal that comes, and list them."""
    received: list[int] = []

    def handle(signum: int, _frame: object) -> None:
        received.append(signum)
        _pass_on(children, signum)

    before = {signum: signal.signal(signum, handle) for signum in heeded()}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _pass_on(children: Children, signum: int) -> None:
    """Send a signal to all processes that still run; those that were stopped (SIGSTOP) go on, to receive it."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)
            child.send_signal(signal.SIGCONT)


def _end(children: Children) -> None:
    """Kill all processes and what they started, after a moment in which they write the stacks of their threads."""
    left = [child for child in children if child.poll() is None]
    _pass_on(left, _STACKS)
    deadline = time.monotonic() + _STACK_SECONDS
    while time.monotonic() < deadline and any(child.poll() is None for child in left):
        time.sleep(_POLL_SECONDS)
    for child in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that a file system holds
            child.wait(_STACK_SECONDS)


def _echo(log: Path, start: int, over: threading.Event) -> None:
    """Print what is added to a log from byte `start` on, until `over` is set."""
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
