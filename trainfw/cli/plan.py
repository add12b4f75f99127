from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from trainfw.cli.options import Overrides, RecipePath


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
) -> None:
    """Predict the memory, traffic and time of a recipe on its hardware, which need not be here. No data is needed."""
    from trainfw import backends
    from trainfw.planning import plan as make_plan
    from trainfw.planning import simulated_cores
    from trainfw.recipe import load_recipe

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
