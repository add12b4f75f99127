from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from trainfw import launch, sweeping, training
from trainfw.cli.options import Devices, Nodes, Overrides, RecipePath, check_page, load
from trainfw.cli.terminal import Clock, say
from trainfw.errors import UserError
from trainfw.streams import go_on_without_output
from trainfw.unfinished import write_text

_WITH_SLURM = "With --slurm: "


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Directory of the runs (default: runs/NAME-sweep).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the table as one JSON document.")] = False,
    isoflop: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,C",
            help="Train sizes of the model at each of these budgets of FLOPs, fit scaling laws, predict the loss of a "
            "larger budget, and make that run.",
        ),
    ] = None,
    predict: Annotated[
        str | None, typer.Option(metavar="C", help="With --isoflop: the larger budget (default: 4 times the largest).")
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(metavar="D,D,...", help="With --isoflop: widths (default: a quarter of the recipe's to 1.5)."),
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Also write the drawing here.")] = None,
    devices: Devices = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs as one Slurm array.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help=f"{_WITH_SLURM}print the script, and submit nothing.")
    ] = False,
    at_once: Annotated[int | None, typer.Option(metavar="N", help=f"{_WITH_SLURM}runs at a time.")] = None,
    nodes: Nodes = None,
    time: Annotated[str | None, typer.Option(help=f"{_WITH_SLURM}limit of a run, as sbatch takes it.")] = None,
    partition: str | None = None,
    account: str | None = None,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="OPTION", help=f"{_WITH_SLURM}another of sbatch.")] = None,
) -> None:
    """Train every combination of values and compare. KEY=A,B,C names them; the same command goes on."""
    go_on_without_output()
    check_page("--svg", svg)
    fixed, values = sweeping.read_grid(overrides or ())
    if isoflop is not None:
        if values or slurm:
            raise UserError(f"--isoflop: goes without {next(iter(values), '--slurm')}{'=A,B' * bool(values)}")
        _isoflop(recipe, fixed, _numbers("--isoflop", isoflop), predict, widths, out, devices, json_, svg)
        return
    for option, text in (("--predict", predict), ("--widths", widths)):
        if text is not None:
            raise UserError(f"{option} goes with --isoflop")
    runs = sweeping.make_runs(recipe, values, out, fixed)
    if slurm:
        make_job = functools.partial(
            launch.SlurmJob,
            nodes=nodes,
            time=time,
            partition=partition,
            account=account,
            options=sbatch or (),
            devices=devices,
        )
        _submit(sweeping.array_of(runs, make_job, at_once=at_once, write=not dry_run), dry_run)
        return
    of_slurm = {"nodes": nodes, "time": time, "partition": partition, "account": account, "at-once": at_once}
    given = of_slurm | {"sbatch": sbatch or None, "dry-run": dry_run or None}
    if first := next((name for name, value in given.items() if value is not None), None):
        raise UserError(f"--{first} goes with --slurm")
    with _stopped_in_words(), Clock() as progress:
        found = sweeping.run_all(runs, progress, devices=devices)
    _show(found, json_, svg if any(result.finished for result in found.results) else None)
    if found.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _stopped_in_words() -> Iterator[None]:
    try:
        yield
    except training.Interrupted as stop:
        say(f"stopped by {stop}", err=True)
        raise typer.Exit(128 + stop.signum) from None


def _show(found: sweeping.Sweep | sweeping.IsoFlop, as_json: bool, svg: Path | None) -> None:
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        say(found)
    if svg is not None:
        write_text(svg, found.to_svg())
        say(f"wrote {svg}", err=True)


def _isoflop(
    recipe: str,
    overrides: list[str],
    budgets: list[float],
    predict: str | None,
    widths: str | None,
    out: Path | None,
    devices: int | None,
    as_json: bool,
    svg: Path | None,
) -> None:
    farthest = None if predict is None else _numbers("--predict", predict)[0]
    chosen = None if widths is None else [int(width) for width in _numbers("--widths", widths)]
    loaded = load(recipe, overrides)
    with _stopped_in_words(), Clock() as progress:
        found = sweeping.isoflop(
            loaded, budgets, predict=farthest, widths=chosen, out=out, devices=devices, progress=progress
        )
    _show(found, as_json, svg)
    if found.failed:
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> list[float]:
    """Read `3e11,6e11` as numbers above zero. Raises UserError."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"{option} {text}: expected numbers above zero with commas between them, such as 3e11,6e11")
    return numbers


def _submit(array: launch.SlurmArray, dry_run: bool) -> None:
    if dry_run:
        typer.echo(array.script(), nl=False)
        return
    number = launch.submit(array)
    logs = array.directory / "logs"
    say(f"array {number} of {len(array.jobs)} runs submitted; its story: {logs}/slurm-{number}_*.log")
    say("once it is done, the same command without --slurm lists the runs")
