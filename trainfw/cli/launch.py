from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainfw.cli.options import Overrides, RecipePath

app = typer.Typer(help="Train a recipe in many processes.", no_args_is_help=True)

Resume = Annotated[str, typer.Option(metavar="auto|never|must", help="Resume where the run directory left off.")]
RunDir = Annotated[str | None, typer.Option(help="Where the run is kept (default: runs/<name>).", show_default=False)]


@app.command()
def local(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(help="How many.")] = 2,
    devices: Annotated[int, typer.Option(help="CPU devices that each of them simulates.")] = 1,
    resume: Resume = "auto",
    run_dir: RunDir = None,
) -> None:
    """Train in several processes of this machine, as on several instances."""
    from trainfw.launch import launch_local
    from trainfw.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    directory = run_dir or os.path.join("runs", loaded.name)
    command = [sys.executable, "-m", "trainfw", "train", recipe, *(overrides or ())]
    command += ["--devices", str(devices), "--run-dir", directory, "--resume", resume]
    code = launch_local(command, processes, Path(directory) / "logs", lambda text: typer.echo(text, err=True))
    if code:
        raise typer.Exit(code)
