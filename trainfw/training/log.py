from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from trainfw.training.reporter import Reporter
from trainfw.training.run_directory import RunDirectory


class MetricsLog:
    """Writes each row to metrics.jsonl and to TensorBoard, and flushes it. A disk that takes none does not end the run.

    Args:
        writes: whether this process is the one that writes.
    """

    def __init__(self, run: RunDirectory, resumed_step: int | None, reporter: Reporter, *, writes: bool = True):
        self._run, self._reporter, self._writes, self._failed = run, reporter, writes, False
        self._open(resumed_step)

    def _open(self, step: int | None) -> None:
        if self._writes:
            with _without_torch():
                from tensorboardX.event_file_writer import EventsWriter
                from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._file = self._run.metrics_file.open("a", encoding="utf-8")
            self._run.tensorboard.mkdir(exist_ok=True)
            # Not SummaryWriter, whose thread dies of a full disk, and whose full queue would then hold us for ever.
            self._events = EventsWriter(str(self._run.tensorboard / "events"))
            if step is not None:  # hides what an interrupted session logged beyond its last checkpoint
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=step + 1, wall_time=time.time(), session_log=start))

    def write(self, row: dict[str, Any]) -> None:
        if not self._writes:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            summary = Summary(
                value=[
                    Summary.Value(tag=name, simple_value=value)
                    for name, value in row.items()
                    if name != "step" and value is not None
                ]
            )
            self._events.write_event(Event(step=row["step"], wall_time=time.time(), summary=summary))
            self._events.flush()
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._reporter.note(f"warning: {self._run}: metrics cannot be written: {error.strerror}")
            self._failed = True

    def rewind(self, step: int) -> None:
        """Steps after `step` are to be done again: drop their rows."""
        self.close()
        if self._writes:
            self._run.drop_after(step)
        self._open(step)

    def close(self) -> None:
        if not self._writes:
            return
        # Each row was flushed as it was written; a full disk here must not hide why the run ended.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()


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
