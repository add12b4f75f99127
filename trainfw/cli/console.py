from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from trainfw.cli.signals import leaving_at_once
from trainfw.cli.terminal import for_terminal, in_colour
from trainfw.streams import go_on_without_output
from trainfw.training import Reporter, short_rate
from trainfw.utf8 import printable


@contextlib.contextmanager
def cleaning_up() -> Iterator[Reporter]:
    """Let signals end the command at once, and what it writes go; its result is a file, and stdout may be lost."""
    go_on_without_output()
    with contextlib.closing(make_reporter()) as reporter, leaving_at_once("nothing is written"):
        yield reporter


def make_reporter() -> Reporter:
    """Make a progress bar on a terminal, plain lines in a pipe."""
    return TerminalReporter() if sys.stdout.isatty() else Reporter()


class TerminalReporter(Reporter):
    """One Rich progress bar at the bottom; notes and logged rows scroll above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Rate(TextColumn):
            def render(self, task: Task) -> Text:
                self.text_format = "" if task.speed is None else short_rate(task.speed)
                return super().render(task)

        super().__init__()
        columns = (BarColumn(), MofNCompleteColumn(), Rate(""), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, transient=True)
        self._tasks: dict[str, Any] = {}
        self._progress.start()

    def note(self, text: str) -> None:
        from rich.text import Text

        console, text = self._progress.console, printable(text)
        if "\n" not in text:  # several lines are a sample, and shown as they are
            text = for_terminal(text, console.width, colour=in_colour(console.file))
        console.print(Text.from_ansi(text), highlight=False, soft_wrap=True)

    def progress(self, description: str, completed: int, total: int | None) -> None:
        if description not in self._tasks:
            for task in self._tasks.values():
                self._progress.remove_task(task)
            self._tasks = {description: self._progress.add_task(description, total=total)}
        self._progress.update(self._tasks[description], completed=completed, total=total)

    def step(self, step: int, steps: int) -> None:
        self.progress("training", step, steps)

    def close(self) -> None:
        self._progress.stop()
