from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainfw import planning
from trainfw import recipe as recipes
from trainfw.cli.options import (
    Count,
    Hardware,
    Overrides,
    RecipePath,
    Serve,
    ServeCache,
    ServeLayout,
    ServeLength,
    ServeSlots,
    ServeWeights,
    Stage,
    check_page,
    load,
    load_for,
)
from trainfw.cli.serving import check_alone, plan_server, search_servers, topology_to_serve
from trainfw.cli.simulated import build_for, load_simulated
from trainfw.cli.terminal import Clock, say
from trainfw.errors import UserError
from trainfw.hardware import Topology
from trainfw.unfinished import write_text

_Search = Annotated[
    bool,
    typer.Option(
        "--search",
        help="Look for a better layout, and write it as a recipe that extends this one. With --serve: list the layouts "
        "and slots that are best in time and price.",
    ),
]


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    hardware: Hardware = None,
    count: Count = None,
    stage: Stage = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write it as a page to look at.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Also on so many units of its topology: strong and weak scaling, goodput with failures, spares. With "
            "--serve: requests a second; how many units they take.",
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile anew, even what was compiled before.")] = False,
    search: _Search = False,
    function: Annotated[
        str, typer.Option(metavar="NAME", help="The function to plan: train, evaluate, or of models of images denoise.")
    ] = "train",
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="With --function denoise: runs that an image takes (default: 20)."),
    ] = None,
    serve: Serve = False,
    layout: ServeLayout = None,
    slots: ServeSlots = None,
    length: ServeLength = None,
    weights: ServeWeights = None,
    cache: ServeCache = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="With --serve: tokens of a prompt (2048).")] = None,
    output: Annotated[int | None, typer.Option(min=1, help="With --serve: tokens of an answer (256).")] = None,
    objective: Annotated[
        str, typer.Option(metavar="time|cost|memory", help="With --search: what to make small.")
    ] = "time",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --search: the recipe to write (default: NAME-planned.yaml)."),
    ] = None,
) -> None:
    """Predict a recipe's memory, traffic and time on its hardware. That need not be here, and no data is needed."""
    check_page("--html", html)
    of_server = {"--layout": layout, "--slots": slots, "--length": length, "--weights": weights, "--cache": cache}
    if not serve:
        check_alone({**of_server, "--prompt": prompt, "--output": output})
    else:
        others = overrides, stage, no_cache, function != "train", steps, objective != "time", out
        if any(others):
            raise UserError("--serve: goes without keys of a recipe and without options of other plans")
        topology = topology_to_serve(hardware, count)
        how = search_servers if search else plan_server
        how(recipe, topology, of_server, (prompt or 2048, output or 256), scale, html, json_)
        return
    _check_search(search, objective, out, no_cache, html, scale)
    if steps is not None and function != "denoise":
        raise UserError("--steps goes with --function denoise")
    if function != "train":
        if search or scale is not None or html is not None or no_cache:
            raise UserError(f"--function {function}: goes without --search, --scale, --html and --no-cache")
        _plan_function(*load_simulated(recipe, overrides or (), hardware, count, stage), function, steps, json_)
        return
    counts = () if scale is None else planning.parse_counts(scale)
    loaded = load_for(recipe, overrides, hardware, count, stage)
    if search:
        if not loaded.stages and load(recipe, overrides).stages:
            one = "one layout is written for all stages; give stages=[], with the rows and the batch of the largest"
            raise UserError(f"--search: {one}")
        _search(loaded, recipe, objective, out, json_)
        return
    _plan_recipe(loaded, counts, html, json_, fresh=no_cache)


def _check_search(
    search: bool, objective: str, out: Path | None, no_cache: bool, html: Path | None, scale: str | None
) -> None:
    """Raise UserError for options that do not go with --search, or only with it."""
    if not search and (out is not None or objective != "time"):
        raise UserError("--objective and --out go with --search")
    if search and no_cache:
        raise UserError("--no-cache plans one recipe: give it without --search")
    if search and html is not None:
        raise UserError("--html draws one plan: give it without --search, for the recipe that the search writes")
    if search and scale is not None:
        raise UserError("--scale is of one layout: give it without --search, for the recipe that the search writes")


def _plan_recipe(
    recipe: recipes.Recipe, counts: tuple[int, ...], html: Path | None, as_json: bool, *, fresh: bool
) -> None:
    cores = max(planning.simulated_cores(recipe), planning.scaling_cores(recipe, counts))
    with Clock() as progress:
        made = planning.plan(recipe, progress=progress, simulate=cores, fresh=fresh)
        scaled = planning.scale_out(recipe, counts, progress, simulate=cores, fresh=fresh) if counts else None
    if as_json:
        typer.echo(json.dumps(made.to_json() | (scaled.to_json() if scaled else {}), indent=2))
    else:
        say(made if scaled is None else f"{made}\n\n{scaled}")
    if html is not None:
        from trainfw.report import plan_page, scaling_section

        further = "" if scaled is None else scaling_section(scaled)
        write_text(html, plan_page(made, planning.whatif(made), further))
        say(f"wrote {html}", err=True)


def _plan_function(recipe: recipes.Recipe, topology: Topology, name: str, steps: int | None, as_json: bool) -> None:
    with Clock() as progress:
        program = build_for(recipe, topology, progress)
        progress(f"compiling {name} for {program.mesh.size} cores")
        made = planning.plan_program_function(program, name, topology, steps or planning.DRAWING_STEPS)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
    else:
        say(made)


def _search(recipe: recipes.Recipe, source: str, objective: str, out: Path | None, as_json: bool) -> None:
    file = out or planning.default_out(recipe)
    planning.check_out(file, source, named=out is not None)
    with Clock() as progress:
        found = planning.survey(recipe, objective)
        progress(f"{len(found.candidates):,} candidates by formula; compiling the best of them takes minutes")
        best = planning.search_layouts(found, progress, simulate=found.simulated_cores)
    if as_json:
        typer.echo(json.dumps(best.to_json(), indent=2))
    else:
        say(best)
    if best.winner is None:
        raise typer.Exit(1)
    written = planning.write_winner(best, source, file)
    kept = "the recipe as it is is the best found; nothing is written"
    say(f"wrote {file}" if written else kept, err=True)
