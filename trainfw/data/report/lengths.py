"""Lengths of documents and examples, and the rows that they make."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainfw.data.cache import BATCH_ROWS
from trainfw.data.config import DataConfig
from trainfw.data.examples import Encoder, Refusals
from trainfw.data.preferences import PairEncoder
from trainfw.data.progress import Progress, reported
from trainfw.data.report.sample import Sampled
from trainfw.data.rows import DocumentRows, ExampleRows, PairRows, Rows, torn_share
from trainfw.data.sources import Row
from trainfw.data.store import TokenStore
from trainfw.data.tokenizer import BATCH_BYTES, Tokenizer, first_bytes

_UNBOUNDED = 2**40
"""Length of rows into which every example fits."""


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths."""

    count: int
    total: int
    p1: int
    p50: int
    p99: int
    max: int
    histogram: dict[int, int]
    """Number of lengths from each power of two up to the next."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """Summarise lengths; percentiles are lengths that occur."""
        if not len(lengths):
            return cls(0, 0, 0, 0, 0, 0, {})
        p1, p50, p99 = np.percentile(lengths, [1, 50, 99], method="inverted_cdf").tolist()
        powers, counts = np.unique(np.log2(np.maximum(lengths, 1)).astype(int), return_counts=True)
        histogram = {2**power: count for power, count in zip(powers.tolist(), counts.tolist())}
        return cls(len(lengths), int(lengths.sum()), p1, p50, p99, int(lengths.max()), histogram)


@dataclass(frozen=True)
class RowFill:
    """Rows that documents or examples make: how full they are, and what they do to documents."""

    packing: str
    rows: int
    filled: float
    torn: float = 0.0
    """Share of the documents that are in more than one row."""
    left_out: float = 0.0
    """Share of the documents, or examples, that are in no row."""


def document_lengths(sample: Sequence[Sampled], tokenizer: Tokenizer, progress: Progress | None) -> np.ndarray:
    """Return the tokens of each document, markers included: i64, (documents,)."""
    texts = (str(one.value) for one in reported(sample, "Counting tokens", len(sample), progress))
    lengths: list[int] = []
    while batch := list(first_bytes(texts, BATCH_BYTES)):
        lengths += [len(ids) + 2 for ids in tokenizer.encode_batch(batch)]
    return np.array(lengths, np.int64)


def example_lengths(
    sample: Sequence[Sampled], source: int, config: DataConfig, tokenizer: Tokenizer, progress: Progress | None
) -> tuple[np.ndarray, Refusals]:
    """Return the tokens of a source's examples, of pairs of both sides in turn, and the rows that cannot be used.

    Raises UserError where the tokenizer has no chat template, and needs one.
    """
    one = next(iter(config.parts.values()))  # of a mixture, whose sources have the same options here
    unbounded = one.model_copy(update={"sequence_length": _UNBOUNDED})
    encoder = (PairEncoder if config.format == "preferences" else Encoder)(unbounded, tokenizer)
    rows = iter(_rows(reported(sample, "Counting tokens", len(sample), progress), source))
    lengths: list[int] = []
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        lengths += [len(one.ids) for one in encoder.encode(batch)]
    return np.array(lengths, np.int64), encoder.refusals


def _rows(sample: Iterable[Sampled], source: int) -> Iterator[Row]:
    """Yield the rows of a source, each as often as it has it."""
    for one in sample:
        for _ in range(one.counts.get(source, 0)):
            yield Row(one.id, one.value)


def fill_rows(lengths: np.ndarray, config: DataConfig) -> list[RowFill]:
    """Return the rows that lengths make: of text in each way of packing, of examples in the one that they have."""
    size = config.sequence_length
    if not lengths.sum():
        return []
    if config.format != "text":
        group = 2 if config.format == "preferences" else 1
        by_group = lengths.reshape(-1, group)
        fits = by_group.max(axis=1) <= size + 1
        kept = np.minimum(by_group if config.too_long == "truncate" else by_group[fits], size + 1)
        store = _store(kept.reshape(-1), group)
        rows = ExampleRows(store, size) if group == 1 else PairRows(store, size, config.pairs_per_row)
        return [RowFill("best_fit", len(rows), rows.filled, left_out=1 - len(kept) / len(by_group))]
    store = _store(lengths, 0)
    plain, cut, whole = Rows(store, size), DocumentRows(store, size), DocumentRows(store, size, whole=True)
    return [
        RowFill("concatenate", len(plain), plain.filled, torn=torn_share(store, size)),
        RowFill("best_fit", len(cut), cut.filled, torn=float(np.mean(lengths > size + 1))),
        RowFill("best_fit, split: never", len(whole), whole.filled, left_out=whole.left_out / len(lengths)),
    ]


def _store(lengths: np.ndarray, group: int) -> TokenStore:
    """Return a store of such lengths, whose tokens take no memory; of a `group` of examples, or 0 of documents."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.broadcast_to(np.uint16(0), int(ends[-1]))
    learnt = np.broadcast_to(np.bool_(True), len(tokens)) if group else None
    return TokenStore(tokens, ends, 0, "", learnt, max(group, 1))
