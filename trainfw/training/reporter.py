from __future__ import annotations

import time
from typing import Any

from trainfw.streams import print_line
from trainfw.utf8 import printable


class Reporter:
    """Plain lines by which a run speaks to people. The CLI has one with a progress bar for terminals."""

    def __init__(self) -> None:
        self._progress_of, self._last_progress = "", 0.0
        self._began = (0.0, 0)

    def note(self, text: str) -> None:
        print_line(printable(text))  # whoever listened may have gone; the run goes on

    def progress(self, description: str, completed: int, total: int | None) -> None:
        """Long work outside the step loop: `completed` of `total`, in the description's units."""
        # A line now and then: a pipe has no bar to redraw, and short work needs none.
        now = time.monotonic()
        if description != self._progress_of or completed <= 1:
            self._progress_of, self._last_progress = description, now
            self._began = (now, completed)
        elif now - self._last_progress > 10:
            self._last_progress = now
            since, before = self._began
            rate = f" ({short_rate((completed - before) / (now - since))})"
            self.note(f"{description}: {completed:,}" + (f" of {total:,}" if total else "") + rate)

    def step(self, step: int, steps: int) -> None:
        """A step is done."""

    def row(self, row: dict[str, Any], steps: int) -> None:
        accuracy = f"  accuracy {row['preference_accuracy']:.2f}" if "preference_accuracy" in row else ""
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        images = row.get("images_per_second")
        speed = f"{row['tokens_per_second']:,.0f} tok/s" if images is None else f"{images:,.0f} images/s"
        self.note(
            f"step {row['step']:>{len(str(steps))}}/{steps}  loss {row['loss']:.4f}{accuracy}  "
            f"lr {row['learning_rate']:.2e}  grad norm {row['grad_norm']:.2f}  "
            f"{row['step_time_seconds']:.3f} s  {speed}{mfu}"
        )

    def close(self) -> None:
        """The run has ended, well or not."""


def short_rate(per_second: float) -> str:
    """Write a rate, in three digits at most where it is below a thousand."""
    return f"{per_second:,.{0 if per_second >= 100 else 1}f}/s"
