from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainfw import launch, training
from trainfw import recipe as recipes
from trainfw.cli.options import Accept, Nodes, Overrides, RecipeCommand, RecipePath, Resume, RunDir, check_resume, load
from trainfw.cli.terminal import say
from trainfw.streams import go_on_without_output

app = typer.Typer(help="Train a recipe in many processes.", no_args_is_help=True)


def _directory(run_dir: str | None, recipe: recipes.Recipe) -> str:
    """Return the run directory as `train` finds it."""
    return os.path.expanduser(run_dir or os.path.join("runs", recipe.name))


@app.command(cls=RecipeCommand)
def local(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(help="How many.")] = 2,
    devices: Annotated[int, typer.Option(help="CPU devices that each of them simulates.")] = 1,
    grace: Annotated[int, typer.Option(help="Seconds to save and leave in, once told to stop.", min=1)] = 120,
    resume: Resume = "auto",
    run_dir: RunDir = None,
    accept: Accept = None,
) -> None:
    """Train in several processes of this machine. As on several instances."""
    go_on_without_output()
    check_resume(resume)
    loaded = load(recipe, overrides)
    directory = _directory(run_dir, loaded)
    training.check_place(directory, loaded)
    # -P: no module of the working directory stands in the place of Python's or of a package's.
    command = [sys.executable, "-P", "-m", "trainfw", "train", launch.as_argument(recipe), *(overrides or ())]
    command += ["--devices", str(devices), "--run-dir", directory, "--resume", resume]
    command += launch.accepting(accept or ())
    code = launch.launch_local(command, processes, Path(directory) / "logs", lambda text: say(text, err=True), grace)
    if code:
        raise typer.Exit(code)


@app.command(cls=RecipeCommand)
def slurm(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Nodes = None,
    time: Annotated[str | None, typer.Option(help="Limit, as sbatch takes it.")] = None,
    partition: str | None = None,
    account: str | None = None,
    grace: Annotated[int, typer.Option(help="Seconds between SIGTERM and the time limit.", min=0)] = 120,
    restarts: Annotated[int, typer.Option(help="How often the job may requeue itself.", min=0)] = 100,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Another of sbatch, such as --sbatch=--exclude=trn-7.")
    ] = None,
    tasks_per_node: Annotated[int, typer.Option(help="Processes a node, where several share one.", min=1)] = 1,
    devices: Annotated[int | None, typer.Option(help="CPU devices that each process simulates.")] = None,
    run_dir: RunDir = None,
    accept: Accept = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Train under Slurm, requeued when it is stopped. One process a node, saved first."""
    loaded = load(recipe, overrides)
    job = launch.SlurmJob(
        loaded,
        recipe,
        overrides or (),
        Path(_directory(run_dir, loaded)),
        nodes=nodes,
        time=time,
        partition=partition,
        account=account,
        grace=grace,
        restarts=restarts,
        options=sbatch or (),
        tasks_per_node=tasks_per_node,
        devices=devices,
        accept=accept or (),
    )
    if dry_run:
        typer.echo(job.script(), nl=False)
        return
    number = launch.submit(job)
    logs = job.run_dir / "logs"
    say(f"job {number} submitted; its story: {logs}/slurm-{number}.log, each process's: {logs}/rank-*.log")


@app.command(cls=RecipeCommand)
def kubernetes(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    image: Annotated[str, typer.Option(help="A container image with trainfw in it.")],
    volume: Annotated[
        list[str],
        typer.Option(
            metavar="CLAIM[:PATH]",
            help="A PersistentVolumeClaim that all pods can write, and where they see it (default: /CLAIM). The run is "
            "kept in the first.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Default: the recipe's.")] = None,
    namespace: str | None = None,
    nodes: Nodes = None,
    efa: Annotated[
        int | None, typer.Option(help="EFA interfaces a node offers (default: the instance's).", min=0)
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=AMOUNT", help="Ask for it in each pod too, such as memory=1500Gi, cpu=180."),
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Queue of Kueue to wait in.")] = None,
    grace: Annotated[int, typer.Option(help="Seconds between SIGTERM and SIGKILL.", min=1)] = 120,
    restarts: Annotated[int, typer.Option(help="How often the pods may be started anew.", min=0)] = 100,
    run_dir: Annotated[str | None, typer.Option(help="In the pods (default: runs/NAME in the first volume).")] = None,
    accept: Accept = None,
) -> None:
    """Print a JobSet that trains. It has one pod a node, started anew when it stops for no fault of its own.

    For kubectl: trainfw launch kubernetes RECIPE ... | kubectl apply -f -
    """
    job = launch.KubernetesJob(
        load(recipe, overrides),
        image=image,
        volumes=volume,
        name=name,
        namespace=namespace,
        nodes=nodes,
        efa=efa,
        resources=resource or (),
        queue=queue,
        grace=grace,
        restarts=restarts,
        run_dir=run_dir,
        accept=accept or (),
    )
    typer.echo(job.manifest(), nl=False)
