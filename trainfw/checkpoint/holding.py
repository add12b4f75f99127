"""Holds on checkpoints that are read while their run goes on and deletes old ones."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainfw.checkpoint.config import MANIFEST
from trainfw.errors import RunError

T = TypeVar("T")

_TRIES = 10


class Vanished(RunError):
    """A checkpoint that was there, and was deleted before it was read to the end."""


class Held(Exception):
    """A checkpoint that another process reads."""


class Hold:
    """A hold on a checkpoint: as long as it lives (or in a `with` block), the run does not delete the checkpoint.

    It is a lock on the manifest, which needs no right to write. Object stores and some file systems have no such locks:
    there, a checkpoint that is deleted meanwhile raises Vanished.

    Args:
        alone: refuse other holds, to delete the checkpoint.

    Raises Vanished where it is gone or being deleted; with `alone`, Held where it is read.
    """

    def __init__(self, directory: Path, *, alone: bool = False):
        self._file: int | None = None
        path = directory / MANIFEST
        if "://" in str(directory) or not path.is_file():
            if not alone:
                check_there(directory)
            return
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.flock(self._file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            gone = not os.path.samestat(os.fstat(self._file), os.stat(path))
        except BlockingIOError:
            self.release()
            raise (Held(str(directory)) if alone else _vanished(directory)) from None
        except FileNotFoundError:
            gone = True
        except OSError:  # no locks here, or no right to read, which reading will report
            return
        if gone:
            self.release()
            raise _vanished(directory)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def check_there(directory: Path) -> None:
    """Raise Vanished where a checkpoint is no longer there, which explains any failure to read it."""
    if not directory.exists():
        raise _vanished(directory)


def _vanished(directory: Path) -> Vanished:
    return Vanished(
        f"{directory}: was deleted while it was read (its run goes on, and keeps the newest alone: "
        "checkpoint.keep_last)"
    )


def taking_the_next(read: Callable[[], T], step: int | None = None) -> T:
    """Return the result of `read` on the newest checkpoint; if it vanishes meanwhile, warn and read the next one.

    No other is read in place of a `step` that was asked for. Raises Vanished after ten tries.
    """
    for left in reversed(range(_TRIES)):
        try:
            return read()
        except Vanished as error:
            if step is not None or not left:
                raise
            warnings.warn(f"{error}; reading the next one", stacklevel=2)
    raise AssertionError("unreachable")
