"""Places of a run's rows, as data: metrics.jsonl, TensorBoard, and loggers of a script's own."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainfw.errors import RunError
from trainfw.pieces import name_of
from trainfw.training.records import Row, append_rows
from trainfw.training.reporter import Reporter
from trainfw.training.run_directory import RunDirectory

_MOST_PENDING = 100_000
"""Rows kept while the disk takes none: some tens of megabytes."""


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
            for row in rows:
                numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
                self._add(row["step"], [{"tag": name, "simple_value": value} for name, value in numbers.items()])
            self._open().flush()
        except OSError:
            self.close()
            raise

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Write a picture, as the bytes of a PNG file."""
        self._add(step, [{"tag": name, "image": {"encoded_image_string": png}}])
        self._open().flush()

    def _add(self, step: int, values: list[dict[str, object]]) -> None:
        events = self._open()
        from tensorboardX.proto.event_pb2 import Event

        events.write_event(Event(step=step, wall_time=time.time(), summary={"value": values}))

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


class MetricsLog:
    """Gives each row to metrics.jsonl, to TensorBoard and to a script's loggers. What one does not take comes later.

    Args:
        writes: whether this process is the one that writes.
        loggers: a script's own.
    """

    def __init__(
        self,
        run: RunDirectory,
        resumed_step: int | None,
        reporter: Reporter,
        *,
        writes: bool = True,
        loggers: Sequence[Logger] = (),
    ):
        self._run, self._reporter, self._writes = run, reporter, writes
        self._file = _Feed(JsonLines(run))
        others = [_Feed(logger, resumed_step) for logger in (TensorBoard(run), *loggers)]
        self._feeds = [self._file, *others] if writes else []
        self._failed = False
        self.failure: RunError | None = None
        """Failure of a script's own logger, which gets no more rows."""
        self._validations: list[dict[str, Any]] | None = None
        """The first row of a validation and the last, or none; None where metrics.jsonl is to be read for them."""

    def write(self, row: dict[str, Any]) -> None:
        for feed in self._feeds:
            feed.pending.append(row)
        if self._writes:
            if _validates(row):
                self._validations = [*self.validations()[:1], row]
            self.catch_up()

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Give a picture to loggers that take any. One that cannot be written now is not written later."""
        for feed in self._feeds:
            if hasattr(feed.logger, "picture"):
                with contextlib.suppress(OSError):
                    feed.logger.picture(step, name, png)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the rows of metrics.jsonl, and then those that are to come there."""
        last = math.inf if self._file.drop_after is None else self._file.drop_after
        yield from (row for row in self._run.metrics() if row["step"] <= last)
        yield from tuple(self._file.pending)

    def validations(self) -> list[dict[str, Any]]:
        """Return the first row of a validation and the last one (the same where there is but one); or none.

        The file is read for them once, and not at every validation of a long run.
        """
        if self._validations is None:
            first = last = None
            for row in self.rows():
                if _validates(row):
                    first, last = first or row, row
            self._validations = [row for row in (first, last) if row is not None]
        return self._validations

    def rewind(self, step: int) -> None:
        """Steps after `step` are to be done again: drop their rows."""
        for feed in self._feeds:
            feed.rewind(step)
        if self._writes:
            self._validations = None
            self.catch_up()

    def catch_up(self, *, durable: bool = False) -> None:
        """Write what was not taken before. Warns, once, where it is not taken now.

        Args:
            durable: all rows are then on disk, or it was said.
        """
        problem = ""
        for feed in tuple(self._feeds):
            try:
                feed.catch_up(durable=durable)
            except OSError as error:
                problem = problem or error.strerror or str(error)
            except RunError as error:
                self._reporter.note(f"warning: {error}; it gets no more rows")
                self.failure = self.failure or error
                self._feeds.remove(feed)
                self._ending(feed.close)
        if problem and not self._failed:
            self._reporter.note(f"warning: {self._run}: metrics cannot be written: {problem}; they are kept for later")
        if self._failed and not problem:
            self._reporter.note(f"{self._run}: metrics are written again")
        self._failed = bool(problem)

    def close(self) -> None:
        """Try a last time; a full disk here must not hide why the run ended."""
        if any(feed.pending or feed.drop_after is not None for feed in self._feeds):
            self.catch_up()
        if lost := max((len(feed.pending) for feed in self._feeds), default=0):
            self._reporter.note(f"warning: {self._run}: {lost} rows of metrics are lost")
        for feed in self._feeds:
            self._ending(feed.close)

    def _ending(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RunError as error:
            self._reporter.note(f"warning: {error}")


class _Feed:
    """A logger, with what it is still to be told."""

    def __init__(self, logger: Logger, drop_after: int | None = None):
        self.logger = logger
        self.pending: deque[dict[str, Any]] = deque(maxlen=_MOST_PENDING)
        self.drop_after = drop_after
        """The last step whose rows stay, where it has not been rid of later ones yet."""

    def rewind(self, step: int) -> None:
        kept = [row for row in self.pending if row["step"] <= step]
        self.pending.clear()
        self.pending.extend(kept)
        self.drop_after = step

    def catch_up(self, *, durable: bool) -> None:
        """Tell it. Raises OSError where it takes nothing now, RunError where it fails otherwise."""
        with self._own_code():
            if self.drop_after is not None:
                self.logger.rewind(self.drop_after)
                self.drop_after = None
            if self.pending:
                self.logger.write(tuple(dict(row) for row in self.pending))  # theirs to change
                self.pending.clear()
            if durable and hasattr(self.logger, "sync"):
                self.logger.sync()

    def close(self) -> None:
        """End it. Raises RunError where it fails otherwise than by the system's word."""
        with contextlib.suppress(OSError), self._own_code():
            if hasattr(self.logger, "close"):
                self.logger.close()

    @contextlib.contextmanager
    def _own_code(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise
        except (Exception, SystemExit) as error:  # to leave would be to end well
            self.pending.clear()
            raise RunError(f"logger {name_of(self.logger)}: {type(error).__name__}: {error}") from error


def _validates(row: Row) -> bool:
    return row.get("validation_loss") is not None
