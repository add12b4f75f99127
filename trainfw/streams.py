"""Standard output and error of a process: closed, full or gone, they do not end what it does beside writing them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

_OUT, _ERR = 1, 2
_NAMES = {_OUT: "stdout", _ERR: "stderr"}


class _Standard(io.FileIO):
    """A standard stream. What cannot be written is an error with its name or, where it is `optional`, dropped."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.name: Any = f"<{_NAMES[descriptor]}>"
        self.called, self.optional = _NAMES[descriptor], descriptor == _ERR

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            written = super().write(data)
        except OSError as error:
            if not self.optional:
                raise OSError(error.errno, error.strerror, self.called) from None
            written = None
        return len(memoryview(data).cast("B")) if written is None and self.optional else written


_RAW: dict[int, _Standard] = {}


def open_standard() -> None:
    """Give the starting process all three streams, and give errors of writing to them a name.

    A descriptor that is closed would be that of the next file opened, and what is printed would go into it. Python
    ends with exit code 120 where it cannot flush them; `flush_standard` comes before that.
    """
    for descriptor in (0, _OUT, _ERR):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest that is free; not open for writing, so that a result is missed
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    sys.stdout, sys.stderr = _wrapped(sys.stdout, _OUT), _wrapped(sys.stderr, _ERR)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]


def _wrapped(stream: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    raw = _RAW[descriptor] = _Standard(descriptor)
    if stream is not None:
        stream.flush()
    at_once = descriptor == _ERR or getattr(stream, "line_buffering", False) or getattr(stream, "write_through", False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors=getattr(stream, "errors", "backslashreplace"),
        line_buffering=at_once,
    )


def go_on_without_output() -> None:
    """Drop what cannot be written to stdout from now on: this command's purpose is not there."""
    if raw := _RAW.get(_OUT):
        raw.optional = True
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def flush_standard() -> OSError | None:
    """Flush at the end of a process; return why not all of stdout could be written, if so; the rest is dropped."""
    problem = None
    for descriptor, stream in ((_OUT, sys.stdout), (_ERR, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            problem = problem or error
            if raw := _RAW.get(descriptor):
                raw.optional = True
        with contextlib.suppress(OSError):
            stream.flush()
    return problem


def print_line(text: str) -> None:
    """Print a line that nobody may read: a stream that takes none does not matter."""
    stream = sys.stdout
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
