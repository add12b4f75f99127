"""Files and directories that appear whole or not at all, and of which an end at any moment leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_SUFFIX = ".partial"
_REMOVERS: list[Callable[[], None]] = []
_FINISHING = threading.Lock()
"""Held while something gets its name, and for ever by who removes what has none."""


@contextlib.contextmanager
def writing(target: Path, *, directory: bool = False) -> Iterator[Path]:
    """Make a temporary file, or directory, beside `target`, which gets its name when it is on disk.

    After an error nothing is left, nor after a signal where `remove_unfinished` is called before the end; what a
    process left that could not, is removed when the same target is written again. It is known by a lock that only
    a living writer holds. Raises OSError, with a path.
    """
    target = target.absolute()
    temporary: Path | None = None
    lock: int | None = None
    made: list[Path] = []

    def remove() -> None:
        if temporary is not None:
            _remove(temporary)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()

    try:
        _make_parents(target.parent, made)
        for name in filter(_partial(target).fullmatch, os.listdir(target.parent)):
            with contextlib.suppress(OSError):
                left = os.open(target.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _locked(left):
                        _remove(target.parent / name)
                finally:
                    os.close(left)
        temporary, lock = _make(target, directory)
        with removed_by_signal(remove):
            yield temporary
            sync_tree(temporary)
            with _FINISHING:
                os.rename(temporary, target)
                made.clear()
        sync(target.parent)
    except OSError as error:
        ours = error.filename is None or _partial(target).fullmatch(os.path.basename(str(error.filename)))
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        remove()  # nothing, where it has its name
        if lock is not None:
            os.close(lock)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8. A pipe or a device is written to as it is.

    Raises OSError, also for a pipe that nobody reads.
    """
    if file.exists() and not file.is_file():
        descriptor = os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(descriptor, True)  # it has a reader, who may be slow
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    if not file.parent.is_dir():  # a slip of the pen, rather than a directory to be made
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    with writing(Path(os.path.realpath(file))) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def scratch_directory() -> Iterator[str]:
    """Make a temporary directory of the system's, which goes at the end."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="trainfw-"))
        stack.enter_context(removed_by_signal(lambda: shutil.rmtree(directory, ignore_errors=True)))
        yield directory


@contextlib.contextmanager
def removed_by_signal(remove: Callable[[], None]) -> Iterator[None]:
    """Call `remove` where a signal ends the process inside."""
    _REMOVERS.append(remove)
    try:
        yield
    finally:
        _REMOVERS.remove(remove)


def remove_unfinished() -> None:
    """Remove what is being written, in whatever thread. For a process that ends at once afterwards: nothing is
    finished any more."""
    _FINISHING.acquire(timeout=1.0)
    for remove in reversed(list(_REMOVERS)):
        with contextlib.suppress(Exception):
            remove()


def _make(target: Path, directory: bool) -> tuple[Path, int]:
    """Make a temporary path, and the lock on it, which goes with the process."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
        if directory:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with contextlib.suppress(FileNotFoundError):  # another writer took it for a leftover
            lock = os.open(temporary, os.O_RDONLY)
            if _locked(lock) is not False and os.path.exists(temporary):
                return temporary, lock
            os.close(lock)


def _locked(descriptor: int) -> bool | None:
    """Try to take the lock, and tell whether it is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _partial(target: Path) -> re.Pattern[str]:
    """Match the names that `_make` gives."""
    return re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}")


def _remove(path: Path) -> None:
    for _ in range(3):  # a thread may be writing into it still
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if not path.exists():
            return


def sync_tree(path: Path) -> None:
    """Write a file, or a directory and all below it, to disk: a rename that outlives a loss of power must not outlive
    what it names."""
    for directory, _, files in os.walk(path):
        for name in files:
            sync(Path(directory, name))
        sync(Path(directory))
    if path.is_file():
        sync(path)


def sync(path: Path) -> None:
    """Write a file's bytes, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.path.isdir(path):
            with contextlib.suppress(OSError):  # some file systems have no such thing for a directory
                os.fsync(descriptor)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_parents(directory: Path, made: list[Path]) -> None:
    """Make the directories that were not there, and add them to `made`."""
    if not directory.exists():
        _make_parents(directory.parent, made)
        directory.mkdir()
        made.append(directory)
