"""Tokens on disk: files of blocks, each with a checksum that is compared whenever the block is read."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from trainfw.errors import RunError

BLOCK = 4096
"""Bytes of a block: small beside a row's, and its checksum takes a microsecond."""
_CHECKSUM = 8
_PAYLOAD = BLOCK - _CHECKSUM
_BLOCKS_KEPT = 512
_RUN = 4
"""Blocks that are read at once where more follow one another, and not kept."""
_PIECE = 2**20
"""Numbers read at once where all of a file are read."""

Mend = Callable[[str, Callable[[], bool]], None]
"""Function that makes files anew, or raises RunError. Its arguments are a description of one file's damage, and a
function that tells whether that file is whole by now."""


class StoredArray:
    """The numbers of one file, read block by block on demand.

    A block that differs from what was written (flipped, torn, gone, or of another file) is mended and read again;
    numbers that were never written are not returned. Files are not mapped into memory: one that is cut short is damage,
    and no SIGBUS.
    """

    def __init__(self, file: Path, dtype: np.dtype, length: int, identity: str, mend: Mend) -> None:
        """Open `length` numbers, written under the same `identity`.

        Raises OSError or ValueError where the file is not there, or has another size.
        """
        self._file, self._dtype, self._length, self._mend = file, dtype, length, mend
        self._key = _key(file.name, identity)
        self._per_block = _PAYLOAD // dtype.itemsize
        self._num_blocks = -(-length // self._per_block)
        self._open()
        self._block = functools.lru_cache(_BLOCKS_KEPT)(self._mended)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return a slice without a step, (n,). Raises RunError where it is damaged and cannot be mended."""
        start, stop, _ = part.indices(self._length)
        if start >= stop:
            return np.empty(0, self._dtype)
        first, last = start // self._per_block, (stop - 1) // self._per_block
        blocks = self._read(first, last) if last - first >= _RUN else None
        if blocks is None:
            blocks = [self._block(index) for index in range(first, last + 1)]
        skipped = first * self._per_block
        whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return whole[start - skipped : stop - skipped]

    def searchsorted(self, value: int, side: str = "right") -> int:
        """Return the place of `value` among the ascending numbers, after those equal to it (as NumPy's arrays do)."""
        assert side == "right"
        after = bisect.bisect_right(range(self._num_blocks), value, key=lambda index: self._block(index)[0])
        last = max(after - 1, 0)
        return last * self._per_block + int(self._block(last).searchsorted(value, side="right"))

    def _open(self) -> None:
        descriptor = _Descriptor(self._file)
        expected = self._length * self._dtype.itemsize + self._num_blocks * _CHECKSUM
        if (size := os.fstat(descriptor.number).st_size) != expected:
            raise ValueError(f"{self._file} has {size} bytes, not {expected}")
        self._descriptor = descriptor

    def _mended(self, index: int) -> np.ndarray:
        if (blocks := self._read(index, index)) is not None:
            return blocks[0]
        problem = f"{self._file}: block {index} of {self._num_blocks} is damaged"
        self._mend(problem, lambda: self._read_anew(index) is not None)
        if (blocks := self._read_anew(index)) is None:
            raise RunError(f"{problem}, and was again once it had been written anew; look at the disk")
        return blocks[0]

    def _read_anew(self, index: int) -> list[np.ndarray] | None:
        try:
            self._open()
        except (OSError, ValueError):
            return None
        return self._read(index, index)

    def _read(self, first: int, last: int) -> list[np.ndarray] | None:
        """Read blocks, (at most `_per_block`,) each; None where one of them is not what was written."""
        descriptor = self._descriptor  # stays open, even if another thread opens the file anew meanwhile
        try:
            data = os.pread(descriptor.number, (last - first + 1) * BLOCK, first * BLOCK)
        except OSError:
            return None
        blocks = []
        for index in range(first, last + 1):
            start = (index - first) * BLOCK
            if (numbers := self._checked(data[start : start + BLOCK], index)) is None:
                return None
            blocks.append(numbers)
        return blocks

    def _checked(self, data: bytes, index: int) -> np.ndarray | None:
        """Return the numbers of a block's bytes; None where they are not what was written."""
        count = min(self._per_block, self._length - index * self._per_block)
        payload, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if len(payload) != count * self._dtype.itemsize or checksum != _checksum(payload, index, self._key):
            return None
        return np.frombuffer(payload, self._dtype)


def open_arrays(
    directory: Path, split: str, kinds: Mapping[str, tuple[DTypeLike, int]], identity: str, mend: Mend
) -> dict[str, StoredArray]:
    """Open the files of these kinds, each of a type and a length; see `StoredArray`."""
    return {
        kind: StoredArray(directory / f"{split}.{kind}", np.dtype(dtype), length, identity, mend)
        for kind, (dtype, length) in kinds.items()
    }


class _Descriptor:
    """A file that is open for reading as long as this object lives."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO is not waited for

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _key(name: str, identity: str) -> int:
    return zlib.crc32(f"{identity}/{name}".encode())


def _checksum(payload: bytes, index: int, key: int) -> bytes:
    """Return the checksum of a block at its place in its file: at another place it would differ."""
    return zlib.crc32(payload, zlib.crc32(index.to_bytes(8, "little"), key)).to_bytes(_CHECKSUM, "little")


Numbers = np.ndarray | StoredArray


@dataclass(frozen=True)
class TokenStore:
    """The documents of one split as one stream of tokens, read from its files on demand."""

    tokens: Numbers
    """(num_tokens,) uint16 or uint32: each document is bos, its tokens, eos."""
    offsets: Numbers
    """(num_documents + 1,) int64: document i is `tokens[offsets[i]:offsets[i + 1]]`."""
    num_bytes: int
    """UTF-8 bytes of the documents' text, or of the learnt text of examples."""
    digest: str
    """Hash of the tokens, the ends of documents and the learnt flags: the same data has the same digest anywhere."""
    learnt: Numbers | None = None
    """(num_tokens,) bool: True for a token of an example that is to be predicted. None for text, all of it learnt."""
    group: int = 1
    """Number of consecutive examples that belong together: 2 for pairs (the chosen one and the rejected)."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_targets(self) -> int:
        """Number of tokens to predict; in text these are all but the first of each document, the begin marker."""
        if self.learnt is None:
            return self.num_tokens - self.num_documents
        return sum(int(np.count_nonzero(piece)) for piece in _pieces(self.learnt))

    @property
    def largest_id(self) -> int:
        """Largest id of all tokens, all of which are read."""
        return max((int(piece.max()) for piece in _pieces(self.tokens)), default=0)


def _pieces(numbers: Numbers) -> Iterator[np.ndarray]:
    return (numbers[start : start + _PIECE] for start in range(0, len(numbers), _PIECE))


@dataclass(frozen=True)
class StoreInfo:
    """Record of a store in the cache's meta.json."""

    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    digest: str
    examples: bool = False
    group: int = 1

    def open(self, directory: Path, split: str, identity: str, mend: Mend) -> TokenStore:
        """Open the store that `StoreWriter` wrote under the same `identity`; `mend` mends blocks damaged later.

        Raises OSError or ValueError where a file is not there, or has another size.
        """
        kinds: dict[str, tuple[DTypeLike, int]] = {"tokens": (self.dtype, self.num_tokens)}
        kinds["offsets"] = np.int64, self.num_documents + 1
        if self.examples:
            kinds["learnt"] = np.bool_, self.num_tokens
        arrays = open_arrays(directory, split, kinds, identity, mend)
        return TokenStore(num_bytes=self.num_bytes, digest=self.digest, group=self.group, **arrays)


class BlockWriter:
    """Writer of a file of blocks, which `close` completes."""

    def __init__(self, file: Path, identity: str) -> None:
        self._key = _key(file.name, identity)
        self._file = file.open("wb")
        self._rest = bytearray()
        self._index = 0

    def write(self, data: bytes) -> None:
        self._rest += data
        whole = len(self._rest) // _PAYLOAD * _PAYLOAD
        for start in range(0, whole, _PAYLOAD):
            self._put(bytes(self._rest[start : start + _PAYLOAD]))
        del self._rest[:whole]

    def close(self) -> None:
        if self._rest:
            self._put(bytes(self._rest))
            self._rest.clear()
        self._file.close()

    def _put(self, payload: bytes) -> None:
        self._file.write(payload + _checksum(payload, self._index, self._key))
        self._index += 1


def ids_dtype(vocab_size: int) -> np.dtype:
    """Return the type of stored ids."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class StoreWriter(contextlib.AbstractContextManager["StoreWriter"]):
    """Writer of documents, or of `examples`, to a store's files, which are whole once the `with` block has ended.

    Args:
        identity: name of the data: a block under another name counts as damage.
        group: number of examples that belong together.
    """

    def __init__(
        self, directory: Path, split: str, vocab_size: int, identity: str, *, examples: bool = False, group: int = 1
    ) -> None:
        self._group = group
        self._dtype = ids_dtype(vocab_size)
        self._tokens = BlockWriter(directory / f"{split}.tokens", identity)
        self._offsets = BlockWriter(directory / f"{split}.offsets", identity)
        self._learnt = BlockWriter(directory / f"{split}.learnt", identity) if examples else None
        self._hash = hashlib.blake2b(digest_size=16)
        self._num_tokens = self._num_documents = self._num_bytes = 0
        self._offsets.write(np.int64(0).tobytes())

    def append(self, ids: list[int], num_bytes: int, learnt: list[bool]) -> None:
        """Add an example of `ids`. `learnt` flags the tokens to predict, whose text has `num_bytes` bytes in UTF-8."""
        data = np.array(ids, self._dtype).tobytes()
        self._num_tokens += len(ids)
        self._num_documents += 1
        self._num_bytes += num_bytes
        end = np.int64(self._num_tokens).tobytes()
        self._tokens.write(data)
        self._offsets.write(end)
        self._hash.update(data + end)
        assert self._learnt is not None
        mask = np.array(learnt, np.bool_).tobytes()
        self._learnt.write(mask)
        self._hash.update(mask)

    def extend(self, ids: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Add documents of text: their ids one after another, (n,), and how many each has, (documents,) int64."""
        ends = self._num_tokens + np.cumsum(lengths)
        self._tokens.write(ids.tobytes())
        self._offsets.write(ends.tobytes())
        # For the digest the end of each document, in units of the ids' size, follows its ids.
        units = np.dtype(np.int64).itemsize // self._dtype.itemsize
        places = (ends - self._num_tokens + units * np.arange(len(ends)))[:, None] + np.arange(units)
        mixed = np.empty(len(ids) + places.size, self._dtype)
        of_ids = np.ones(len(mixed), np.bool_)
        of_ids[places] = False
        mixed[of_ids], mixed[places] = ids, ends.view(self._dtype).reshape(places.shape)
        self._hash.update(mixed.data)
        self._num_tokens += len(ids)
        self._num_documents += len(lengths)
        self._num_bytes += num_bytes

    def info(self) -> StoreInfo:
        counts = (self._num_tokens, self._num_documents, self._num_bytes)
        return StoreInfo(self._dtype.name, *counts, self._hash.hexdigest(), self._learnt is not None, self._group)

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._offsets, self._learnt):
            if file is not None:
                file.close()
