"""Iterators over rows: endless and shuffled for training, one ordered pass for validation."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from trainfw.data.config import DataConfig
from trainfw.data.images.store import ImageRows, ImageStore
from trainfw.data.rows import RowSet, open_rows, open_validation_rows
from trainfw.data.store import TokenStore
from trainfw.errors import UserError

Batch = dict[str, np.ndarray]
"""The arrays named in `rows.FIELDS`, each (B, S), or (B, 2, S) of pairs; or those of `ImageRows`. B is this process's
share of the global batch."""

State = dict[str, Any]
"""Place in an endless order of rows, as JSON writes it."""

READ_THREADS = 2
"""Reading a row is a page or two from disk and a little NumPy: more threads only contend for the interpreter."""


class Resumable(abc.ABC):
    """Rows, or batches of them, without end: the same ones in every process, from a place that JSON can write."""

    @abc.abstractmethod
    def get_state(self) -> State:
        """Return the place after the last one, as JSON; the same in every process, whatever their number."""

    @abc.abstractmethod
    def set_state(self, state: State) -> None:
        """Go on from `state`, with any number of processes. Raises UserError where it does not lead there."""

    @abc.abstractmethod
    def restart(self) -> None:
        """Go back to the beginning."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop reading ahead. Closing twice is harmless."""


class EndlessBatches(Resumable, Iterator[Batch]):
    """Batches of rows in one endless order, some of which are left out."""

    _next_row: int
    _skipped: frozenset[int] = frozenset()

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size

    def __next__(self) -> Batch:
        self._pass_skipped()
        return self._take()

    @property
    def next_row(self) -> int:
        """First row of the next batch, counted in the endless order."""
        self._pass_skipped()
        return self._next_row

    def enter(self, stage: int) -> None:
        """Go on with a stage (of its number, from 0) of the run: here, with the same rows."""

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        """Let a batch that is waited for fail (RunError) once `asked` says so: here, none is waited for."""

    def skip(self, rows: Iterable[int]) -> None:
        """Leave out every batch that holds one of these rows of the endless order, now and after `set_state`."""
        self._skipped = frozenset(rows)

    def _pass_skipped(self) -> None:
        while not self._skipped.isdisjoint(range(self._next_row, self._next_row + self._global_batch_size)):
            self._take()

    @abc.abstractmethod
    def _take(self) -> Batch:
        """Return the next batch, skipped or not."""


class GrainBatches(EndlessBatches):
    """Batches that Grain reads ahead, of which this process has its share."""

    def __init__(self, global_batch_size: int, prefetch: int, process_index: int, process_count: int) -> None:
        super().__init__(global_batch_size)
        self._share, self._prefetch = slice(process_index, None, process_count), prefetch
        self._batches: Any = None

    def close(self) -> None:
        """Stop reading ahead. Closing twice is harmless."""
        if self._batches is not None:
            self._batches.close()

    def _take(self) -> Batch:
        batch = next(self._batches)
        self._next_row += self._global_batch_size
        return batch

    def _read(self, rows: grain.MapDataset) -> None:
        """Go on with these rows, in the place of those before."""
        self.close()
        batches = rows.batch(self._global_batch_size // self._share.step, drop_remainder=True)
        threads = min(READ_THREADS, self._prefetch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch)
        # Process p of P has every P-th batch, so that the shares, one after another, are the global batch in order.
        self._batches = iter(batches[self._share].to_iter_dataset(options))


class TrainIterator(GrainBatches):
    """Training batches without end; see `train_iterator`."""

    def __init__(
        self, rows: RowSet, config: DataConfig, global_batch_size: int, process_index: int, process_count: int
    ) -> None:
        super().__init__(global_batch_size, config.prefetch, process_index, process_count)
        self._stream, self._order = shuffled(rows, config, config.seed)
        self.restart()

    def get_state(self) -> State:
        """Return the place after the last batch, as JSON; the same in every process, whatever their number."""
        return {"next_row": self._next_row, "order": self._order}

    def set_state(self, state: State) -> None:
        """Go on from `state`, with any number of processes. Raises UserError where it is of another order of rows."""
        if state.get("order") != self._order:
            raise UserError(
                "the data has changed since this state was saved (its text, tokenizer, sequence_length, packing, "
                "shuffle, flip or seed), so its place means nothing here; restore the data, or start a new run"
            )
        self._seek(state["next_row"])

    def restart(self) -> None:
        self._seek(0)

    def _seek(self, next_row: int) -> None:
        self._next_row = next_row
        self._read(self._stream[next_row:])


def shuffled(rows: RowSet, config: DataConfig, seed: int | Sequence[int]) -> tuple[grain.MapDataset, str]:
    """Return rows in one endless order, and what identifies it."""
    stream = grain.MapDataset.source(rows)
    if config.shuffle:
        # Grain adds the epoch to its seed, so neighbouring seeds would share their epochs' orders.
        stream = stream.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    state = rows.order(f"{config.shuffle} {seed if config.shuffle else None}")
    return rows.endless(stream.repeat()), hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


def train_iterator(
    store: TokenStore | ImageStore,
    config: DataConfig,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """Iterate over this process's share of batches, global_batch_size / process_count rows each, without end.

    Every epoch is shuffled anew. Global batch k is rows [k*B, k*B + B) of one endless order that the number of
    processes does not change; the shares in order of process make it up. Raises UserError where the batch does not
    divide, or there are too few rows for one.
    """
    check_share(global_batch_size, process_count)
    rows = row_set(store, config)
    rows.require(global_batch_size)
    return TrainIterator(rows, config, global_batch_size, process_index, process_count)


def validation_batches(
    store: TokenStore | ImageStore,
    config: DataConfig,
    *,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Yield this process's share of one pass in order; rows of zeros (`loss_mask`, `weight`) fill up the last batch.

    Every process sees the same number of batches. Raises UserError where the batch does not divide.
    """
    share = check_share(global_batch_size, process_count)
    rows = row_set(store, config, held_out=True)
    starts = range(process_index * share, -(-len(rows) // global_batch_size) * global_batch_size, global_batch_size)

    def batches() -> Iterator[Batch]:
        for start in starts[:max_batches]:
            batch = rows.empty(share)
            for i, index in enumerate(range(start, min(start + share, len(rows)))):
                for name, values in rows[index].items():
                    batch[name][i] = values
            yield batch

    return batches()


def check_share(global_batch_size: int, process_count: int) -> int:
    """Return the rows of a batch that each process has. Raises UserError where it does not divide."""
    share, rest = divmod(global_batch_size, process_count)
    if rest or share < 1:
        raise UserError(f"a global batch of {global_batch_size} does not divide among {process_count} processes")
    return share


def row_set(store: TokenStore | ImageStore, config: DataConfig, *, held_out: bool = False) -> RowSet:
    """Return the rows of a store; of one that is held out, nothing is left out."""
    if isinstance(store, ImageStore):
        return ImageRows(store, config)
    return (open_validation_rows if held_out else open_rows)(store, config)
