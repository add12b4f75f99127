from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainfw.cli.options import Devices, Overrides, RecipePath


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    devices: Devices = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|must", help="Resume where the run directory left off.")
    ] = "auto",
    run_dir: Annotated[
        str | None, typer.Option(help="Where the run is kept (default: runs/<name>).", show_default=False)
    ] = None,
) -> None:
    """Train a recipe; stopped, the same command resumes it."""
    from trainfw import backends
    from trainfw.errors import UserError
    from trainfw.recipe import load_recipe

    choices = ("auto", "never", "must")
    if resume not in choices:
        raise UserError(f"--resume {resume}: expected auto, never or must")
    loaded = load_recipe(recipe, overrides or ())
    if run_dir is None and (Path(recipe) / "checkpoints").is_dir():
        run_dir = recipe  # a run directory given as the recipe goes on where it is
    backends.prepare(devices)

    from trainfw import training
    from trainfw.cli.console import make_reporter

    reporter = make_reporter()
    try:
        training.train(loaded, run_dir=run_dir, resume=resume, reporter=reporter)  # type: ignore[arg-type]
    except training.Interrupted as stop:
        reporter.close()
        typer.echo(f"stopped by {stop}, saved; the same command resumes", err=True)
        raise typer.Exit(128 + stop.signum) from None
    finally:
        reporter.close()
