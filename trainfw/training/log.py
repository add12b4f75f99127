from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from trainfw.training.records import Row, append_rows
from trainfw.training.reporter import Reporter
from trainfw.training.run_directory import RunDirectory

_MOST_PENDING = 100_000
"""Rows kept while the disk takes none: some tens of megabytes."""


class MetricsLog:
    """Writes each row to metrics.jsonl and to TensorBoard. What a full disk does not take is written with a later row.

    Args:
        writes: whether this process is the one that writes.
    """

    def __init__(self, run: RunDirectory, resumed_step: int | None, reporter: Reporter, *, writes: bool = True):
        self._run, self._reporter, self._writes = run, reporter, writes
        self._pending: deque[dict[str, Any]] = deque(maxlen=_MOST_PENDING)
        """Rows that metrics.jsonl has not taken yet."""
        self._unshown = self._pending.copy()
        """Rows that TensorBoard's files have not taken yet."""
        self._drop_after: int | None = None
        """The last step whose rows stay in metrics.jsonl, which it has not been rid of yet."""
        self._failed = False
        self._events: Any = None
        self._files = 0
        self._hide_after = resumed_step
        self._validations: list[dict[str, Any]] | None = None
        """The first row of a validation and the last, or none; None where metrics.jsonl is to be read for them."""

    def write(self, row: dict[str, Any]) -> None:
        if self._writes:
            self._pending.append(row)
            self._unshown.append(row)
            if _validates(row):
                self._validations = [*self.validations()[:1], row]
            self.catch_up()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the rows of metrics.jsonl, and then those that are to come there."""
        last = math.inf if self._drop_after is None else self._drop_after
        yield from (row for row in self._run.metrics() if row["step"] <= last)
        yield from tuple(self._pending)

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
        if not self._writes:
            return
        for rows in (self._pending, self._unshown):
            kept = [row for row in rows if row["step"] <= step]
            rows.clear()
            rows.extend(kept)
        self._drop_after = self._hide_after = step
        self._validations = None
        self._close_events()
        self.catch_up()

    def catch_up(self, *, durable: bool = False) -> None:
        """Write what the disk did not take before. Warns, once, where it takes none now.

        Args:
            durable: all rows are then on disk, or it was said.
        """
        if not self._writes:
            return
        try:
            if self._drop_after is not None:
                self._run.drop_after(self._drop_after)
                self._drop_after = None
            append_rows(self._run.metrics_file, self._pending, durable=durable)
            self._pending.clear()
            self._show()
        except OSError as error:
            if not self._failed:
                self._reporter.note(
                    f"warning: {self._run}: metrics cannot be written: {error.strerror}; they are kept for later"
                )
            self._failed = True
            return
        if self._failed:
            self._reporter.note(f"{self._run}: metrics are written again")
        self._failed = False

    def _show(self) -> None:
        """Show in TensorBoard what is to come; after an error in a file of its own: a record cut short ends one."""
        try:
            events = self._open_events()
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.proto.summary_pb2 import Summary

            for row in self._unshown:
                values = [
                    Summary.Value(tag=name, simple_value=value)
                    for name, value in row.items()
                    if name != "step" and value is not None
                ]
                events.write_event(Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values)))
            events.flush()
            self._unshown.clear()
        except OSError:
            self._close_events()
            raise

    def _open_events(self) -> Any:
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

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(OSError):
                events.close()

    def close(self) -> None:
        """Try a last time; a full disk here must not hide why the run ended."""
        if self._pending or self._drop_after is not None:
            self.catch_up()
        if self._pending:
            self._reporter.note(f"warning: {self._run}: {len(self._pending)} rows of metrics are lost")
        self._close_events()


def _validates(row: Row) -> bool:
    return row.get("validation_loss") is not None


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
