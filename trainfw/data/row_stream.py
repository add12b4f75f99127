"""Rows that come one after another from somewhere, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from trainfw.data.pipeline import Batch, EndlessBatches, Resumable, State, check_share
from trainfw.errors import UserError

Row = dict[str, np.ndarray]
"""The arrays named in `rows.FIELDS`, each (S,)."""


class RowStream(Resumable, Iterator[Row]):
    """Rows that come one after another; a place in others than those of its `order` means nothing."""

    order: str
    """Identity of the rows and their order."""

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        """Let a row that is waited for fail (RunError) once `asked` says so."""


class RowBatches(EndlessBatches):
    """Training batches of a `RowStream`; the interface is `TrainIterator`'s.

    Every process draws all rows and keeps its share of each batch; the shares in order of process make it up.
    """

    def __init__(self, rows: RowStream, *, global_batch_size: int, process_index: int, process_count: int) -> None:
        super().__init__(global_batch_size)
        self._resize(global_batch_size, process_index, process_count)
        self._rows = rows
        self._begin(0)

    def get_state(self) -> State:
        """Return the place after the last batch, as JSON; the same in every process, whatever their number."""
        return {"next_row": self._next_row, "order": self._rows.order, "rows": self._after}

    def set_state(self, state: State) -> None:
        """Go on from `state`, with any number of processes. Raises UserError where it is of other rows."""
        if state["order"] != self._rows.order:
            raise UserError(
                "the data has changed since this state was saved (a file, the tokenizer, sequence_length, shuffle, "
                "window or seed), so its place means nothing here; restore the data, or start a new run"
            )
        self._rows.set_state(state["rows"])
        self._begin(state["next_row"])

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        self._rows.give_up_when(asked)

    def restart(self) -> None:
        self._rows.restart()
        self._begin(0)

    def close(self) -> None:
        """Stop reading ahead. Closing twice is harmless."""
        self._rows.close()

    def _resize(self, global_batch_size: int, process_index: int, process_count: int) -> None:
        share = check_share(global_batch_size, process_count)
        self._global_batch_size = global_batch_size
        self._mine = slice(process_index * share, (process_index + 1) * share)

    def _begin(self, next_row: int) -> None:
        self._next_row, self._after, self._broken = next_row, self._rows.get_state(), False

    def _take(self) -> Batch:
        if self._broken:
            self._rows.set_state(self._after)
        self._broken = True
        rows = [next(self._rows) for _ in range(self._global_batch_size)]
        # Only now: a row may fail to come, and what is saved then is the place after the last whole batch.
        self._begin(self._next_row + self._global_batch_size)
        return {name: np.stack([row[name] for row in rows[self._mine]]) for name in rows[0]}
