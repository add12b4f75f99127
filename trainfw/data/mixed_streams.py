"""Mixtures of sources that are read as streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainfw.data.interleave import Interleaving
from trainfw.data.mixture import StageShares, check_history, history
from trainfw.data.pipeline import State
from trainfw.data.row_stream import Row, RowBatches, RowStream
from trainfw.errors import UserError


class MixedRows(RowStream):
    """Rows of several streams, by the shares of the stage that it is in."""

    def __init__(self, streams: Mapping[str, RowStream], stages: Sequence[StageShares]) -> None:
        self._streams, self._stages = streams, stages
        self.order = " ".join(f"{name} {stream.order}" for name, stream in streams.items())
        self._begin(0, 0, None)

    def __next__(self) -> Row:
        source, _ = self._interleaving.place(self._done)
        row = next(self._streams[self._stages[self._stage].names[source]])
        self._done += 1  # only now: a row may fail to come
        return row

    def enter(self, stage: int) -> None:
        """Go on by the shares of a stage. Entering the one that it is in changes nothing."""
        if stage != self._stage:
            self._begin(stage, 0, None)

    def get_state(self) -> State:
        """Return the place after the last row, as JSON; the same in every process."""
        return {
            "stage": self._stage,
            "shares": history(self._stages, self._stage),
            "done": self._done,
            "counts": self._interleaving.counts(self._done),
            "streams": {name: stream.get_state() for name, stream in self._streams.items()},
        }

    def set_state(self, state: State) -> None:
        """Go to a place of the same `order`. Raises UserError where it is of other shares."""
        check_history(self._stages, state["stage"], state["shares"])
        for name, stream in self._streams.items():
            stream.set_state(state["streams"][name])
        if sum(state["counts"]) != state["done"]:
            raise UserError("mixture: this state's rows by source are not those of its place; start a new run")
        self._begin(state["stage"], state["done"], state["counts"])

    def restart(self) -> None:
        for stream in self._streams.values():
            stream.restart()
        self._begin(0, 0, None)

    def close(self) -> None:
        """Stop reading ahead. Closing twice is harmless."""
        for stream in self._streams.values():
            stream.close()

    def give_up_when(self, asked: Callable[[], bool]) -> None:
        """Let a row that is waited for fail once `asked` says so."""
        for stream in self._streams.values():
            stream.give_up_when(asked)

    def _begin(self, stage: int, done: int, counts: Sequence[int] | None) -> None:
        self._stage, self._done = stage, done
        self._interleaving = Interleaving(self._stages[stage].shares, done, counts)


class MixedStreamBatches(RowBatches):
    """Training batches of a mixture of streams, through the stages of a run."""

    def __init__(self, rows: MixedRows, stages: Sequence[StageShares], process_index: int, process_count: int) -> None:
        self._mixed, self._stages, self._process = rows, stages, (process_index, process_count)
        first = stages[0].global_batch_size
        super().__init__(rows, global_batch_size=first, process_index=process_index, process_count=process_count)

    def enter(self, stage: int) -> None:
        """Go on with a stage's shares and batch."""
        self._mixed.enter(stage)
        self._resize(self._stages[stage].global_batch_size, *self._process)
        self._begin(self._next_row)

    def set_state(self, state: State) -> None:
        """Go on from `state`, with any number of processes. Raises UserError where it is of other rows or shares."""
        super().set_state(state)
        self._resize(self._stages[state["rows"]["stage"]].global_batch_size, *self._process)

    def restart(self) -> None:
        super().restart()
        self._resize(self._stages[0].global_batch_size, *self._process)
