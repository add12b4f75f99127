"""Loggers: where the rows of a run go, as data."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from trainfw.training.records import Row, append_rows
from trainfw.training.run_directory import RunDirectory


class Logger:
    """A place for the rows of a run. Of several processes, those of the first one alone are told.

    A row is a dict of `step` and values by name, each an int, a float, or None where there is no finite number. Every
    `train.log_every` steps one comes with `loss`, `grad_norm`, `learning_rate`, `step_time_seconds`,
    `tokens_per_second`, `mfu`, `tokens`, `goodput`, the counts of faults and what the objective measures; every
    validation gives one with `validation_loss` and the like, and an evaluation one with its metric.

    An OSError of any of these (a full disk, a connection that breaks) is said once, and the rows are given again with
    later ones; any other exception ends the run.
    """

    def write(self, rows: Sequence[Row]) -> None:
        """Take the rows that have come since the last call, in order."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Forget the rows of later steps: a run goes on from there, and will do them again."""

    def sync(self) -> None:
        """Have all rows where they outlast a loss of power: a checkpoint is about to be saved."""

    def close(self) -> None:
        """End: no more rows come."""


class JsonLines(Logger):
    """metrics.jsonl of a run."""

    def __init__(self, run: RunDirectory):
        self._run = run

    def write(self, rows: Sequence[Row]) -> None:
        append_rows(self._run.metrics_file, rows)

    def rewind(self, step: int) -> None:
        self._run.drop_after(step)

    def sync(self) -> None:
        append_rows(self._run.metrics_file, (), durable=True)


class TensorBoard(Logger):
    """Event files of a run; after an error in a file of its own: a record cut short ends one."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._events: Any = None
        self._files = 0
        self._hide_after: int | None = None

    def write(self, rows: Sequence[Row]) -> None:
        try:
            events = self._open()
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.proto.summary_pb2 import Summary

            for row in rows:
                values = [
                    Summary.Value(tag=name, simple_value=value)
                    for name, value in row.items()
                    if name != "step" and value is not None
                ]
                events.write_event(Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values)))
            events.flush()
        except OSError:
            self.close()
            raise

    def rewind(self, step: int) -> None:
        self._hide_after = step
        self.close()

    def close(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(OSError):
                events.close()

    def _open(self) -> Any:
        if self._events is None:
            with _without_torch():
                from tensorboardX.event_file_writer import EventsWriter
                from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._run.tensorboard.mkdir(exist_ok=True)
            # Not SummaryWriter, whose thread dies of a full disk, and whose full queue would then hold us for ever.
            self._events = EventsWriter(
                os.path.abspath(self._run.tensorboard / "events"), f".{self._files}" if self._files else ""
            )
            self._files += 1
            if self._hide_after is not None:  # what an interrupted session logged beyond its last checkpoint
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=self._hide_after + 1, wall_time=time.time(), session_log=start))
                self._hide_after = None
        return self._events


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports PyTorch where it is installed: a second or two, for what is not used here."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # "not installed"
    try:
        yield
    finally:
        del sys.modules["torch"]
