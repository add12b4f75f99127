"""Blocks of remote files, kept on this machine's disk within a number of bytes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from trainfw.data.remote import Blocks, RemoteFile

_CHECKSUM = 4


class CachedBlocks:
    """Reader of blocks that keeps those it has read in a directory, and reads the next one of a file ahead.

    Never more than `limit` bytes are in the directory, whichever processes and runs share it: room for a block is made
    before it is written, by deleting those that were not used for longest. A block is a part of a file, so that files
    larger than the limit are no exception; one that is damaged is read again.
    """

    def __init__(self, blocks: Blocks, directory: Path, limit: int, *, ahead: bool = True) -> None:
        """Begin to use a directory. `blocks` reads what is not in it; a `limit` below one block's size keeps none.

        Without `ahead`, no block is read before it is asked for.
        """
        self.size = blocks.size
        self._blocks, self._directory, self._limit = blocks, directory, limit
        self._threads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._reads_ahead = ahead
        self._ahead: tuple[Path, concurrent.futures.Future[bytes]] | None = None
        self._keeps = limit >= self.size + _CHECKSUM

    def read(self, file: RemoteFile, index: int) -> bytes:
        """Return a block, and begin to read the next one. Raises what the inner reader does."""
        name = self._name(file, index)
        ahead, self._ahead = self._ahead, None
        data = ahead[1].result() if ahead is not None and ahead[0] == name else self._read(file, index)
        if self._reads_ahead and (index + 1) * self.size < file.num_bytes:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._ahead = self._name(file, index + 1), self._threads.submit(self._read, file, index + 1)
        return data

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _name(self, file: RemoteFile, index: int) -> Path:
        key = f"{file.url}\0{file.mark}\0{file.num_bytes}\0{self.size}\0{index}"
        return self._directory / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.block"

    def _read(self, file: RemoteFile, index: int) -> bytes:
        path = self._name(file, index)
        with contextlib.suppress(OSError):
            stored = path.read_bytes()
            data, checksum = stored[:-_CHECKSUM], stored[-_CHECKSUM:]
            if _checksum(data) == checksum:
                os.utime(path)  # used now
                return data
        data = self._blocks.read(file, index)
        if self._keeps:
            try:
                self._keep(path, data)
            except OSError as error:  # the data are here, and the run can do without the cache
                self._keeps = False
                log = logging.getLogger("trainfw")
                log.warning("%s: no more is kept of remote files: %s", self._directory, error.strerror or error)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self._directory / "lock").acquire(poll_interval=0.005):
            room = self._limit - len(data) - _CHECKSUM
            held = sorted(self._held(), key=lambda one: one[0])
            used = sum(size for _, size, _ in held)
            for _, size, other in held:
                if used <= room:
                    break
                other.unlink(missing_ok=True)
                used -= size
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                file.write(data)
                file.write(_checksum(data))
            partial.replace(path)

    def _held(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (time of last use, bytes, path) of every block, whole or left by a process that was killed."""
        for entry in os.scandir(self._directory):
            if entry.name != "lock":
                stat = entry.stat()
                yield stat.st_mtime, stat.st_size, Path(entry.path)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "little")
