from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from trainfw.cli.options import Overrides, RecipePath


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write it as a page to look at.")
    ] = None,
) -> None:
    """Predict the memory, traffic and time of a recipe on its hardware, which need not be here. No data is needed."""
    from trainfw import backends, planning
    from trainfw.errors import UserError
    from trainfw.planning import plan as make_plan
    from trainfw.planning import simulated_cores
    from trainfw.recipe import load_recipe

    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise UserError(f"--html {html}: expected a file in a directory that exists")
    loaded = load_recipe(recipe, overrides or ())
    cores = simulated_cores(loaded)
    started = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - started:5.1f} s  {text}", file=sys.stderr, flush=True)

    topology = loaded.hardware.load()
    backends.prepare(cores, as_backend="neuron" if topology is not None and topology.rules == "neuron" else None)
    made = make_plan(loaded, progress)
    if json_:
        import json

        typer.echo(json.dumps(made.to_json(), indent=2))
    else:
        typer.echo(str(made))
    if html is not None:
        from trainfw.report import plan_page

        whatif = getattr(planning, "whatif", None)
        html.write_text(plan_page(made, whatif(made) if whatif else ()), encoding="utf-8")
        print(f"wrote {html}", file=sys.stderr)
