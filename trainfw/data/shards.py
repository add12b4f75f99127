"""Shards: runs of tokenised documents, kept until all of a corpus is done, so that interrupted work goes on."""

from __future__ import annotations

import shutil
import zipfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainfw.data.encoding import PieceEncoder
from trainfw.data.encoding_processes import Encoded, encode_all
from trainfw.data.tokenizer import BATCH_BYTES
from trainfw.unfinished import writing

SHARD_BYTES = 2**26
"""Bytes of text of a shard."""


class Measured(NamedTuple):
    """A document, where it was read, the bytes of its text, and its side."""

    id: str
    text: str
    num_bytes: int
    held_out: bool


@dataclass(frozen=True)
class Shard:
    """Tokenised documents, one after another."""

    ids: np.ndarray
    """(num_tokens,): each document is bos, its tokens, eos."""
    lengths: np.ndarray
    """(num_documents,) int64 tokens."""
    num_bytes: np.ndarray
    """(num_documents,) int64 bytes of text."""
    held_out: np.ndarray
    """(num_documents,) bool."""

    @classmethod
    def joined(cls, shards: Sequence[Shard]) -> Shard:
        return cls(*(np.concatenate([getattr(one, field.name) for one in shards]) for field in fields(cls)))

    def split(self, held_out: bool) -> Shard:
        """Return the documents of one side."""
        chosen = self.held_out == held_out
        if chosen.all():
            return self
        ids = self.ids[np.repeat(chosen, self.lengths)]
        return Shard(ids, self.lengths[chosen], self.num_bytes[chosen], self.held_out[chosen])


class Shards:
    """The directory of a cache's shards, each a file with a checksum of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self, number: int) -> Shard | None:
        """Return a shard; None where it is not there, or not what was written."""
        try:
            with np.load(self._file(number), allow_pickle=False) as arrays:
                return Shard(**{name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, number: int, shard: Shard) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with writing(self._file(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, **{field.name: getattr(shard, field.name) for field in fields(shard)})

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.directory / f"{number:06}.npz"  # whose members have CRC-32s, which NumPy compares


def tokenise(documents: Iterable[Measured], encoder: PieceEncoder) -> Generator[Shard, None, None]:
    """Yield the documents, tokenised, a few at a time. Close the generator where not all of it is used."""
    waiting: deque[tuple[Sequence[Measured], np.ndarray]] = deque()
    """Documents that end in a batch, and the numbers of the pieces that end them."""
    begun: list[np.ndarray] = []
    with closing(encode_all(encoder, _batches(documents, encoder, waiting))) as batches:
        for encoded in batches:
            ended, last = waiting.popleft()
            shard = _with_markers(encoded, ended, last, encoder, begun)
            if shard is not None:
                yield shard


def _batches(
    documents: Iterable[Measured], encoder: PieceEncoder, waiting: deque[tuple[Sequence[Measured], np.ndarray]]
) -> Iterator[list[str]]:
    """Yield batches of pieces, and put which documents end in each into `waiting`."""
    pieces: list[str] = []
    ended: list[Measured] = []
    last: list[int] = []
    size = 0
    for document in documents:
        for piece in encoder.pieces(document.text, document.id):
            if size >= BATCH_BYTES:
                waiting.append((ended, np.array(last, np.int64)))
                yield pieces
                pieces, ended, last, size = [], [], [], 0
            pieces.append(piece)
            size += len(piece)
        ended.append(document._replace(text=""))
        last.append(len(pieces) - 1)
    if pieces:
        waiting.append((ended, np.array(last, np.int64)))
        yield pieces


def _with_markers(
    encoded: Encoded, ended: Sequence[Measured], last: np.ndarray, encoder: PieceEncoder, begun: list[np.ndarray]
) -> Shard | None:
    """Return the documents that end in a batch, with their markers; None where there is none.

    Args:
        last: the numbers of the pieces that end them.
        begun: ids of the document that began in an earlier batch. Afterwards those of one that ends in a later batch.
    """
    ids, counts = encoded
    ends = np.cumsum(counts)[last]
    rest = ids[ends[-1] if len(ends) else 0 :]
    if not len(ends):
        begun.append(rest)
        return None
    before = sum(map(len, begun))
    ids, ends = np.concatenate([*begun, ids[: ends[-1]]]) if before else ids[: ends[-1]], ends + before
    begun[:] = [rest.copy()] if len(rest) else []
    tokenizer = encoder.tokenizer
    lengths = np.diff(ends, prepend=0) + 2
    stops = np.cumsum(lengths)
    marked = np.empty(stops[-1], encoder.dtype)
    inside = np.ones(len(marked), np.bool_)
    inside[stops - 1] = inside[stops - lengths] = False
    marked[inside] = ids
    marked[stops - lengths], marked[stops - 1] = tokenizer.bos_id, tokenizer.eos_id
    num_bytes, held_out = ([getattr(one, name) for one in ended] for name in ("num_bytes", "held_out"))
    return Shard(marked, lengths, np.array(num_bytes, np.int64), np.array(held_out, np.bool_))
