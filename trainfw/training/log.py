from __future__ import annotations

import contextlib
import json
from typing import Any

from trainfw.training.run_directory import RunDirectory


class MetricsLog:
    """Writes each row to metrics.jsonl and to TensorBoard, and flushes it."""

    def __init__(self, run: RunDirectory, resumed_step: int | None):
        from tensorboardX import SummaryWriter

        self._file = run.metrics_file.open("a", encoding="utf-8")
        # purge_step hides what an interrupted session logged beyond its last checkpoint.
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=purge)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        # Each row was flushed as it was written; a full disk here must not hide why the run ended.
        with contextlib.suppress(OSError):
            self._file.close()
            self._writer.close()
