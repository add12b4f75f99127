"""Helper process for work that foreign files ask for: chat templates are programs, tokenizers' expressions nearly so.

Neither Jinja nor the `tokenizers` library limits time and memory, and the latter may end its process. So the helper
does that work within limits that the kernel enforces. If it fails, the command that asked for it reports one line.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

from trainfw.errors import UserError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

BURST_SECONDS = 5
"""Processor time for one piece of work."""
PIECE_SECONDS, BYTE_SECONDS = 0.05, 1e-6
"""More processor time for each of many pieces, and for each byte of their request."""
MEMORY = 2**31
"""Bytes of address space."""
OUTPUT, OUTPUT_PER_BYTE = 2**20, 8
"""Most characters that a piece may write: a fixed number, and more for each byte of its request."""
BATCH = 2**22
"""Bytes of requests sent at once: waiting for each answer takes longer than rendering a template."""
WALL_SECONDS = 300.0
"""Seconds until a helper that does not answer is given up, though it uses no processor time (it was stopped)."""

_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
_LENGTH = struct.Struct("<Q")


class Problem(ValueError):
    """Reason why one piece of work cannot be done; the next one may be."""


class UnusableError(UserError):
    """Reason why a file cannot be used at all."""


class LimitError(UnusableError):
    """Limit that a file's work reached, or the way it ended the helper; the file's name belongs before it."""


# --- In the helper ----------------------------------------------------------------------------------------------------


class _Work:
    """The request that is being answered, and its limits."""

    size, _end = 0, 0.0
    """Bytes of the request."""

    def begin_piece(self) -> None:
        """Begin one piece of the request: the kernel ends the helper when the piece's time is used up."""
        used, more = time.process_time(), PIECE_SECONDS + BYTE_SECONDS * self.size
        self._end = min(self._end or used + BURST_SECONDS, used + BURST_SECONDS) + more
        if resource is not None and self.size:
            resource.setrlimit(resource.RLIMIT_CPU, (int(self._end) + 1, resource.RLIM_INFINITY))

    def check_written(self, text: str) -> str:
        """Return the text that a piece wrote. Raises LimitError for one that is too long."""
        most = OUTPUT + OUTPUT_PER_BYTE * self.size
        if self.size and len(text) > most:
            raise LimitError(f"writes {len(text):,} characters, and {most:,} are allowed for what it was given")
        return text


work = _Work()
"""Current request; outside the helper it has no limits."""


def main() -> None:
    """Answer batches `(function, key, shared or None, requests)` until the other end is closed.

    Batches are pickled, and so are a request's arguments. Answers are JSON, since untrusted work makes them.
    """
    globals().update(json.loads(sys.argv[1]))
    if resource is not None:
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    stream = cast(BinaryIO, socket.socket(fileno=0).makefile("rwb"))
    shared_values: dict[int, Any] = {}
    while head := stream.read(_LENGTH.size):
        answers = _answers(stream.read(_LENGTH.unpack(head)[0]), shared_values)
        stream.write(_LENGTH.pack(len(answers)) + answers)
        stream.flush()


def _answers(batch: bytes, shared_values: dict[int, object]) -> bytes:
    """Return (outcome, value or words) for each request, or for the one that ends the batch alone, as JSON."""
    answers: list[tuple[str, Any]] = []
    try:
        name, key, shared, requests = pickle.loads(batch)
        shared_values.setdefault(key, shared)
        module, _, function = name.partition(":")
        for request in requests:
            work.size = len(request)
            work.begin_piece()
            work_on = getattr(importlib.import_module(f"trainfw.{module}"), function)
            try:
                answers.append(("done", work_on(shared_values[key], *pickle.loads(request))))
            except Problem as error:
                answers.append(("problem", str(error)))
        return json.dumps(answers).encode()
    except MemoryError:
        answers = [("limit", f"needs more than {MEMORY >> 20:,} MB of memory")]
    except Exception as error:
        kind = next((kind for kind, error_class in _ERRORS.items() if isinstance(error, error_class)), "failed")
        answers = [(kind, traceback.format_exc() if kind == "failed" else str(error))]
    return json.dumps(answers).encode()


_ERRORS = {"limit": LimitError, "unusable": UnusableError, "refused": UserError}
"""Outcomes that end a batch, and their errors, the narrowest first."""


# --- In the process that asks -----------------------------------------------------------------------------------------


def start_child(function: str, *arguments: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a Python of its own that runs `trainfw.MODULE.FUNCTION()`, and return it with a socket to its stdin.

    It uses one core, and ends when it reads the end of its stdin: the kernel sees to that however this process ends.

    Args:
        function: "MODULE:FUNCTION".
    """
    module, _, name = function.partition(":")
    near_end, far_end = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from trainfw.{module} import {name}; {name}()", *arguments],
        stdin=far_end.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a panic's backtrace
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))} | _ONE_THREAD,
        start_new_session=True,  # Ctrl-C is for the command, which ends its children
    )
    far_end.close()
    return process, near_end


class Helper:
    """The helper of this process. It starts with the first request, and again after one that reached a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._keys: dict[Any, int] = {}

    def call(self, function: str, shared: Any, *arguments: Any) -> Any:
        """Run `trainfw.MODULE.FUNCTION(shared, *arguments)` in the helper and return its result, through JSON.

        Args:
            function: "MODULE:FUNCTION".
            shared: a hashable argument that many requests have in common, and that is sent only once.

        Raises Problem and UserError as the function does, and LimitError where it reaches a limit or ends the helper.
        """
        [answer] = self.call_each(function, shared, [arguments])
        if isinstance(answer, Problem):
            raise answer
        return answer

    def call_each(self, function: str, shared: Any, requests: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Do as `call` for several requests at once; return the result of each, or the Problem that it raised."""
        answers: list[Any] = []
        batch: list[bytes] = []
        size = 0
        for arguments in requests:
            batch.append(pickle.dumps(arguments))
            size += len(batch[-1])
            if size >= BATCH:
                answers += self._batch(function, shared, batch)
                batch, size = [], 0
        return answers + (self._batch(function, shared, batch) if batch else [])

    def _batch(self, function: str, shared: object, requests: list[bytes]) -> list[object]:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            key, sent = self._keys.get(shared, len(self._keys)), shared in self._keys
            try:
                answers = self._exchange(pickle.dumps((function, key, None if sent else shared, requests)))
            except BaseException:  # an interrupt too: this batch's answer must not be taken for the next one's
                self.close()
                raise
            self._keys[shared] = key
        kind, value = answers[0]
        if kind == "limit":
            self.close()  # it may still hold much memory
        if kind in _ERRORS:
            raise _ERRORS[kind](value)
        if kind == "failed":
            raise RuntimeError(value)
        return [value if kind == "done" else Problem(value) for kind, value in answers]

    def close(self) -> None:
        """End the helper."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            self._answers.close()
            self._socket.close()
            process.kill()
            process.wait()

    def _start(self) -> None:
        limits = ("BURST_SECONDS", "PIECE_SECONDS", "BYTE_SECONDS", "MEMORY", "OUTPUT", "OUTPUT_PER_BYTE")
        values = json.dumps({name: globals()[name] for name in limits})
        self._process, self._socket = start_child("confined:main", values)
        self._answers = self._socket.makefile("rb")
        self._owner, self._keys = os.getpid(), {}

    def _exchange(self, request: bytes) -> list[tuple[str, object]]:
        try:
            self._socket.settimeout(WALL_SECONDS)
            self._socket.sendall(_LENGTH.pack(len(request)) + request)
            [size] = _LENGTH.unpack(self._answers.read(_LENGTH.size))
            return list(json.loads(self._answers.read(size)))
        except TimeoutError:
            raise LimitError(f"gave no answer within {WALL_SECONDS:g} seconds") from None
        except (OSError, struct.error, json.JSONDecodeError):  # it ended before its answer did
            raise LimitError(self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code == -signal.SIGXCPU:
            return f"takes more than {BURST_SECONDS} seconds"
        if code == -signal.SIGABRT:  # as Rust ends for want of memory
            return f"fails, or needs more than {MEMORY >> 20:,} MB of memory, so that its process aborts"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"ends the process that it is tried in ({how})"


helper = Helper()
atexit.register(helper.close)
