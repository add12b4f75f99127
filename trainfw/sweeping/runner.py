"""Runs of a sweep, made in turn on this machine, each in a process of its own."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from trainfw.errors import expect
from trainfw.hardware import in_any_unit
from trainfw.launch import as_argument, launch_local
from trainfw.recipe import RecipeLike
from trainfw.signals import stop_code
from trainfw.sweeping.grid import SweepRun, Values, check_runs, make_runs
from trainfw.sweeping.result import RunResult, Sweep, read_result, read_results
from trainfw.training import Interrupted, RunDirectory

Say = Callable[[str], None]
_LOOK_SECONDS = 10.0
"""Seconds between looks at how far a run is."""
_REASON = re.compile(r"(?:failed|error): (.+)")
_TAIL_LINES = 40


def sweep(
    recipe: RecipeLike,
    values: Values,
    *,
    out: str | Path | None = None,
    devices: int | None = None,
    progress: Say = lambda text: None,
) -> Sweep:
    """Train every combination of values of a recipe's keys in turn, and compare their validation losses.

    `trainfw.sweep("quickstart", {"optimizer.learning_rate": [1e-3, 3e-3]})`. Each run has a process of its own, a
    directory under `out` (default: `runs/NAME-sweep`), and a line in the result. Called again, runs that are done are
    read, and the others go on where they were. A run that fails is in the result with its reason.

    Args:
        recipe: as `load_recipe` takes it.
        values: values of each key.
        devices: CPU devices that each run simulates.
        progress: is told what is being done.

    Raises UserError, before anything starts, for values that make no recipe or go on with another run; Interrupted
    where a signal stopped a run, once that is saved.
    """
    expect("values", values, isinstance(values, Mapping), 'a dict, such as {"optimizer.learning_rate": [1e-3, 3e-3]}')
    runs = make_runs(recipe, values, None if out is None else Path(out), written="values")
    return run_all(runs, progress, devices=devices)


def run_all(runs: Sequence[SweepRun], progress: Say = lambda text: None, *, devices: int | None = None) -> Sweep:
    """Make the runs that are not done, in turn, and write and return the result.

    Raises UserError before anything starts where one cannot, and Interrupted where a signal stopped one.
    """
    problems: dict[str, str] = {}
    for _ in make_each(runs, problems, progress, devices=devices):
        read_results(runs, problems).save()
    found = read_results(runs, problems)
    found.save()
    return found


def make_each(
    runs: Sequence[SweepRun], problems: dict[str, str], progress: Say = lambda text: None, *, devices: int | None = None
) -> Iterator[RunResult]:
    """Make the runs that are not done, one at each turn, and add to `problems` why runs failed, by name.

    Raises as `run_all`.
    """
    check_runs(runs)
    before = {run.name for run in runs if read_result(run).finished}
    if before:
        progress(f"{len(before)} of {len(runs)} runs are done already")
    for number, run in enumerate(runs, start=1):
        if run.name in before:
            continue
        said = f"run {number} of {len(runs)}: {run.name}"
        progress(said)
        result = _run(run, said, progress, devices)
        if result.problem is not None:
            problems[run.name] = result.problem
            progress(f"{said} {result.where}")
        else:
            progress(f"{said}: validation loss {result.loss:.4f}, {in_any_unit(result.seconds)}")
        yield result


def train_command(run: SweepRun, devices: int | None = None) -> list[str]:
    """Return the command that trains a run by the recipe that `write_recipe` writes."""
    # -P: no module of the working directory stands in the place of Python's or of a package's.
    command = [sys.executable, "-P", "-m", "trainfw", "train", as_argument(str(run.recipe_file))]
    return [*command, "--run-dir", str(run.path), *([] if devices is None else ["--devices", str(devices)])]


def _run(run: SweepRun, said: str, progress: Say, devices: int | None) -> RunResult:
    run.write_recipe()
    logs, over = run.path / "logs", threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, said, progress, over), daemon=True)
    watcher.start()
    try:
        code = launch_local(train_command(run, devices), 1, logs, show=False)
    finally:
        over.set()
        watcher.join()
    result = read_result(run)
    if (stopped := stop_code(code)) is not None:
        raise Interrupted(stopped - 128, result.step)
    if code == 0 and result.finished:
        return result
    return read_result(run, _reason(logs / "rank-0.log", code))


def _watch(run: SweepRun, said: str, progress: Say, over: threading.Event) -> None:
    """Say how far a run is whenever it has logged another step."""
    directory, last = RunDirectory(run.path), -1
    while not over.wait(_LOOK_SECONDS):
        row = next(iter(deque((row for row in directory.metrics() if row.get("loss") is not None), maxlen=1)), None)
        if row is not None and row["step"] != last:
            last = row["step"]
            progress(f"{said}: step {last:,} of {run.recipe.train.steps:,}, loss {row['loss']:.4f}")


def _reason(log: Path, code: int) -> str:
    """Return the last reason in a log, without its first word."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:] if log.is_file() else []
    found = [match[1] for line in lines if (match := _REASON.match(line))]
    return found[-1] if found else f"exit code {code}"
