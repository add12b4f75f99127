"""Processes that encode text for this one, on all cores."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import struct
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import BinaryIO, cast

import numpy as np
import tokenizers

from trainfw.confined import start_child
from trainfw.data.encoding import PieceEncoder
from trainfw.data.tokenizer import Tokenizer
from trainfw.errors import RunError, UserError

ALONE_BYTES = 2**24
"""Bytes of text that this process encodes itself before it starts others, which takes them half a second."""
_MOST = 16
"""Most processes: this one reads and writes for about so many."""
_AHEAD = 3
"""Batches that wait for each process."""
_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<cQQ")
"""Kind of an answer (ids, or words of an error), and the bytes of its two parts."""

Batch = Sequence[str]
Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of all pieces of a batch, and how many each of them has."""


# --- In such a process ------------------------------------------------------------------------------------------------


def main() -> None:
    """Encode batches until the other end is closed: the other process has ended, or needs no more."""
    stream = cast(BinaryIO, socket.socket(fileno=0).makefile("rwb"))
    with suppress(OSError, EOFError):
        backend, bos, eos = pickle.loads(_read(stream))
        encoder = PieceEncoder(Tokenizer(tokenizers.Tokenizer.from_str(backend), bos, eos))
        while True:
            batch = pickle.loads(_read(stream))
            try:
                kind, parts = b"i", [one.tobytes() for one in encoder.encode(batch)]
            except UserError as error:
                kind, parts = b"u", [str(error).encode(), b""]
            except Exception:
                kind, parts = b"f", [traceback.format_exc().encode(), b""]
            stream.write(_HEAD.pack(kind, *map(len, parts)) + b"".join(parts))
            stream.flush()
    os._exit(0)  # without complaints about what could not be flushed


def _read(stream: BinaryIO) -> bytes:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return stream.read(_LENGTH.unpack(head)[0])


# --- In the process that asks -----------------------------------------------------------------------------------------


class _Process:
    """One of them, and the socket to it."""

    def __init__(self, encoder: PieceEncoder) -> None:
        tokenizer, self._dtype = encoder.tokenizer, encoder.dtype
        self._process, self._socket = start_child("data.encoding_processes:main")
        self._answers = self._socket.makefile("rb")
        self._given = pickle.dumps((tokenizer.backend.to_str(), tokenizer.bos_id, tokenizer.eos_id))

    def encode(self, batch: Batch) -> Encoded:
        """Encode one batch. Raises UserError as the tokenizer does, RunError where the process has ended."""
        try:
            for data in filter(None, (self._given, pickle.dumps(batch))):
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
            self._given = b""
            kind, *sizes = _HEAD.unpack(self._answers.read(_HEAD.size))
            first, second = (self._answers.read(size) for size in sizes)
        except (OSError, struct.error):
            code = self._process.wait()
            raise RunError(
                f"a process that tokenises has ended (exit code {code}), perhaps for want of memory; the same command "
                "goes on"
            ) from None
        if kind != b"i":
            raise (UserError if kind == b"u" else RunError)(first.decode())
        return np.frombuffer(first, self._dtype), np.frombuffer(second, np.int64)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()


def encode_all(
    encoder: PieceEncoder, batches: Iterable[Batch], processes: int | None = None
) -> Generator[Encoded, None, None]:
    """Yield what each batch becomes, in order; on all cores (or so many `processes`) once there is much text.

    Batches are read ahead. Close the generator where not all of it is used.
    """
    count, alone, batches = min(_usable_cores(), _MOST) if processes is None else processes, ALONE_BYTES, iter(batches)
    # Without words the library's own threads do the work, and bytes are no work.
    while count < 2 or not encoder.by_words or alone > 0:
        if (batch := next(batches, None)) is None:
            return
        alone -= sum(map(len, batch))
        yield encoder.encode(batch)
    waiting: deque[Future[Encoded]] = deque()
    free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    with ThreadPoolExecutor(count, thread_name_prefix="encoding") as threads, ExitStack() as stack:
        for _ in range(count):
            free.put(process := _Process(encoder))
            stack.callback(process.end)
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)  # before the processes end
        for batch in batches:
            waiting.append(threads.submit(_encode, free, batch))
            if len(waiting) > _AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode(free: queue.SimpleQueue[_Process], batch: Batch) -> Encoded:
    process = free.get()
    try:
        return process.encode(batch)
    finally:
        free.put(process)


def _usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
