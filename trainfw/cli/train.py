from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trainfw import backends, checking, hardware, parallel, training
from trainfw import program as programs
from trainfw import recipe as recipes
from trainfw.cli.console import make_reporter
from trainfw.cli.options import Accept, Devices, Overrides, RecipePath, Resume, RunDir, check_resume, load
from trainfw.cli.signals import Leaving, leaving_at_once
from trainfw.cli.terminal import say
from trainfw.errors import RunError
from trainfw.streams import go_on_without_output


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    devices: Devices = None,
    resume: Resume = "auto",
    run_dir: RunDir = None,
    accept: Accept = None,
    as_backend: Annotated[
        str | None,
        typer.Option("--as", metavar="neuron", help="Run on the CPU what Neuron would run, under its rules."),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The recipe's form on 8 simulated devices: a small model, 5 steps.")
    ] = False,
) -> None:
    """Train a recipe; stopped, the same command resumes it."""
    go_on_without_output()
    check_resume(resume)
    training.check_accept(accept or ())
    loaded = load(recipe, overrides)
    if tiny:
        devices = devices or 8
        shrunk = training.tiny_overrides(loaded, devices)
        say(f"tiny: {' '.join(shrunk)}")
        loaded = load(recipe, [*shrunk, *(overrides or ())])
        run_dir = run_dir or tempfile.mkdtemp(prefix="trainfw-tiny-")  # every time anew
    training.check_inputs(loaded)
    if run_dir is None and (Path(recipe) / "metrics.jsonl").is_file():
        run_dir = recipe  # a run directory given as the recipe goes on where it is
    _ignore_what_failed_saves_leave()
    with leaving_at_once() as leaving:
        _run(loaded, devices, resume, run_dir, accept or (), as_backend, leaving)


def _ignore_what_failed_saves_leave() -> None:
    """Ignore Orbax's coroutines and callbacks, of which Python would complain around the one line that matters."""
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _run(
    loaded: recipes.Recipe,
    devices: int | None,
    resume: Resume,
    run_dir: str | None,
    accept: Sequence[str],
    as_backend: str | None,
    leaving: Leaving,
) -> None:
    layout = {axis: getattr(loaded.parallel, axis) for axis in parallel.AXES}
    scan_layers = loaded.train.scan_layers
    wiring = backends.prepare(devices, as_backend, hardware=loaded.hardware, layout=layout, scan_layers=scan_layers)
    backends.connect(wiring, loaded.watchdog.start_seconds)
    if wiring.process_count > 1:
        leaving.meet()

    def approve(program: programs.Program) -> None:
        if as_backend is not None and backends.current().has_sdk:
            _check(program, reporter)

    try:
        with contextlib.closing(make_reporter()) as reporter:
            training.train(loaded, run_dir=run_dir, resume=resume, accept=accept, reporter=reporter, approve=approve)
    except training.Interrupted as stop:
        backends.end_together()
        say(f"stopped by {stop}", err=True)
        raise typer.Exit(128 + stop.signum) from None


def _check(program: programs.Program, reporter: training.Reporter) -> None:
    """Refuse, as Neuron would, what `trainfw check` calls an error."""
    topology = program.recipe.hardware.load()
    if topology is None and program.mesh.size > 1:
        known = "trn2.3xlarge has 4 cores, trn1.32xlarge 32, trn2.48xlarge 64"
        problem = f"--as neuron on {program.mesh.size} devices must know how they are joined; {known}"
        raise program.recipe.error("hardware.topology", problem)
    report = checking.check_program(
        program,
        topology=topology or hardware.load_topology("trn2.3xlarge"),  # a single core is the same everywhere
        sdk=backends.load_sdk(program.recipe.hardware.sdk),
        progress=lambda text: reporter.note(f"check: {text}"),
    )
    if not report.ok:
        for finding in report.errors:
            say(f"\n{finding}", err=True)
        raise RunError(f"Neuron would refuse this program: {report.verdict}")
    reporter.note(f"check: {report.verdict}")
