"""Results of a sweep: what its runs have reached, as a table, as data and as a drawing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.errors import short
from trainfw.hardware import in_any_unit
from trainfw.report import loss_chart, svg_of_chart
from trainfw.sweeping.grid import SweepRun, short_keys, value_text
from trainfw.tables import table
from trainfw.training import RunDirectory
from trainfw.unfinished import write_text

RESULT, DRAWING = "sweep.json", "sweep.svg"
"""Files of a sweep's directory."""
_MOST_LINES = 8
"""Lines of a drawing, beyond which they cannot be told apart."""


@dataclass(frozen=True)
class RunResult:
    """Place that a run has reached."""

    run: SweepRun
    step: int
    """Last step that is saved."""
    loss: float | None
    """Validation loss at the last step of the recipe; None where the run is not there."""
    seconds: float
    """Time that its sessions took."""
    problem: str | None = None
    """Reason that it failed; its log says more."""
    bits_per_byte: float | None = None
    """The same loss per byte of text, which does not depend on the tokenizer."""
    measured: str = ""
    """Name of what the loss is of: the objective, and what was held out. Losses of others are no comparison."""

    @property
    def finished(self) -> bool:
        return self.loss is not None

    @property
    def where(self) -> str:
        """Say in words how far it is."""
        if self.finished:
            return "done"
        if self.problem is not None:
            return f"failed: {self.problem.partition(';')[0]}"
        return f"at step {self.step:,} of {self.run.recipe.train.steps:,}" if self.step else "not begun"

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.run.name,
            "values": dict(self.run.values),
            "directory": str(self.run.path),
            "step": self.step,
            "steps": self.run.recipe.train.steps,
            "validation_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "seconds": round(self.seconds, 3),
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Sweep:
    """Runs of a sweep, and what each has reached."""

    directory: Path
    results: Sequence[RunResult]

    @property
    def keys(self) -> list[str]:
        return list(self.results[0].run.values)

    @property
    def best(self) -> RunResult | None:
        """The finished run of the lowest validation loss; None while there is none, or where these are no comparison.

        Where tokenizers differ, and no other data, it is the one of the fewest bits per byte.
        """
        finished = [result for result in self.results if result.loss is not None]
        if self.by_bits:
            return min(finished, key=lambda result: result.bits_per_byte or math.inf, default=None)
        return min(finished, key=lambda result: result.loss or 0.0, default=None) if self.comparable else None

    @property
    def comparable(self) -> bool:
        """Tell whether all losses are of the same held-out data and objective."""
        return len({result.measured for result in self.results if result.finished}) < 2

    @property
    def by_bits(self) -> bool:
        """Tell whether bits per byte are to be compared: the same documents were held out, as other tokens."""
        others = [key for key in self.keys if key.startswith(("data.", "objective.", "train.validation_batches"))]
        bits = all(result.bits_per_byte is not None for result in self.results if result.finished)
        return bits and not self.comparable and all(key.startswith("data.tokenizer") for key in others)

    @property
    def failed(self) -> list[RunResult]:
        return [result for result in self.results if result.problem is not None]

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys: `directory`, `keys`, `best` (a run's name, or null) and `runs`.

        Each of the runs has `name`, `values` by key, `directory`, `step`, `steps`, `validation_loss` (null before it is
        done), `bits_per_byte` (null where the loss is not of text), `seconds` and `problem` (why it failed, or null).
        """
        return {
            "directory": str(self.directory),
            "keys": self.keys,
            "best": None if self.best is None else self.best.run.name,
            "runs": [result.to_json() for result in self.results],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        done = sum(result.finished for result in self.results)
        yield f"{self.directory}: {done} of {len(self.results)} runs are done"
        rows: list[Sequence[str] | str] = [(*short_keys(self.keys), self._compared, "time", "")]
        for result in self.results:
            values = [
                short(value, 24) if len(str(value)) > 24 else value_text(value) for value in result.run.values.values()
            ]
            compared = result.bits_per_byte if self.by_bits else result.loss
            loss = "-" if compared is None else f"{compared:.4f}"
            spent = in_any_unit(result.seconds) if result.seconds else "-"
            said = "best" if result is self.best else "" if result.finished else result.where
            rows.append((*values, loss, spent, said))
        yield from table(rows, ">" * (len(self.keys) + 2) + "<")
        if self.failed:
            yield f"logs of failed runs: {self.directory}/RUN/logs/rank-0.log; the same command tries them again"
        if not self.comparable and not self.by_bits:
            yield "none is marked as the best: the losses are of other held-out data, or another objective"
        if self._best_is_at_an_end():
            yield "the best is at an end of the values: a better one may lie beyond"

    @property
    def _compared(self) -> str:
        return "bits/byte" if self.by_bits else "val loss"

    def _best_is_at_an_end(self) -> bool:
        """Tell whether a key's numbers, three or more, have their best at an end."""
        if self.best is None or not all(result.finished for result in self.results):
            return False
        for key in self.keys:
            numbers = _numbers([result.run.values[key] for result in self.results])
            if numbers and len(set(numbers)) > 2 and self.best.run.values[key] in (min(numbers), max(numbers)):
                return True
        return False

    def save(self) -> None:
        """Write sweep.json and sweep.svg into the sweep's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self.directory / RESULT, json.dumps(self.to_json(), indent=2) + "\n")
        if any(result.finished for result in self.results):
            write_text(self.directory / DRAWING, self.to_svg())

    def to_svg(self) -> str:
        """Draw validation losses by the values of a key, a line for each combination of the others.

        That key is the one with most numbers; where none has numbers, the first.
        """
        key = max(self.keys, key=self._suits)
        numbers = self._suits(key) > 0
        named = list(dict.fromkeys(value_text(result.run.values[key]) for result in self.results))
        places = {name: float(i + 1) for i, name in enumerate(named)}
        lines: dict[str, list[tuple[float, float]]] = {}
        for result in self.results:
            loss = result.bits_per_byte if self.by_bits else result.loss
            if loss is None:
                continue
            others = {other: value for other, value in result.run.values.items() if other != key}
            name = ", ".join(f"{k} {value_text(v)}" for k, v in zip(short_keys(list(others)), others.values()))
            value = result.run.values[key]
            at = float(value) if numbers and isinstance(value, int | float) else places[value_text(value)]
            lines.setdefault(name or self._compared, []).append((at, loss))
        kept = dict(sorted(lines.items(), key=lambda item: min(y for _, y in item[1]))[:_MOST_LINES])
        (title,) = short_keys([key])
        text = (lambda x: f"{x:g}") if numbers else (lambda x: named[int(x) - 1])
        left_out = f" (the best {_MOST_LINES} of {len(lines)} lines)" if len(lines) > len(kept) else ""
        return svg_of_chart(
            loss_chart(
                f"validation {'bits per byte' if self.by_bits else 'loss'} by {title}{left_out}",
                {name: sorted(points) for name, points in kept.items()},
                column=text,
                logarithmic=numbers and _spread([x for points in kept.values() for x, _ in points]),
            )
        )

    def _suits(self, key: str) -> int:
        """Count the different numbers of a key; 0 where it has other values."""
        return len(set(_numbers([result.run.values[key] for result in self.results]) or ()))


def _numbers(values: Sequence[object]) -> list[float] | None:
    """Return the values, where all are numbers."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return numbers if len(numbers) == len(values) else None


def _spread(values: Sequence[float]) -> bool:
    """Tell whether values are positive, and so far apart that a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) / min(values) >= 4


def read_results(runs: Sequence[SweepRun], problems: Mapping[str, str] | None = None) -> Sweep:
    """Read what runs have reached from their directories.

    Args:
        problems: why runs failed, by name.
    """
    directory = runs[0].path.parent
    return Sweep(directory, [read_result(run, (problems or {}).get(run.name)) for run in runs])


def read_result(run: SweepRun, problem: str | None = None) -> RunResult:
    """Read what one run has reached."""
    if not run.path.is_dir():
        return RunResult(run, 0, None, 0.0, problem)
    directory = RunDirectory(run.path, run.recipe.checkpoint)
    steps = run.recipe.train.steps
    step = max(directory.steps(), default=0)
    found: list[dict[str, Any]] = []
    if step == steps:
        found = [row for row in directory.metrics() if row["step"] == steps and "validation_loss" in row]
    if not found:
        return RunResult(run, step, None, directory.seconds(), problem)
    last, saved = found[-1], directory.saved_meta()
    counts = {key: value for key, value in last.items() if key.startswith("validation_") and key.endswith("s")}
    counted = [count for key, count in counts.items() if isinstance(count, int)]
    measured = f"{run.recipe.objective.model_dump()} {saved.get('held_out')} {counted}"
    bits = last.get("validation_bits_per_byte")
    return RunResult(run, step, last["validation_loss"], directory.seconds(), None, bits, measured)
