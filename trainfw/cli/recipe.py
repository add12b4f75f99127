from __future__ import annotations

import itertools
import json
import re

import typer

from trainfw import recipe as recipes
from trainfw.cli.options import Overrides, RecipeCommand, RecipePath, load
from trainfw.cli.terminal import say

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command(cls=RecipeCommand)
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the resolved recipe as YAML, every key written out."""
    typer.echo(load(recipe, overrides).to_yaml(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    typer.echo(json.dumps(recipes.json_schema(), indent=2))


@app.command("list")
def list_() -> None:
    """List the bundled recipes."""
    bundled = recipes.bundled_recipes()
    width = max((len(name) for name in bundled), default=0)
    for name, path in bundled.items():
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        summary = re.split(r"(?<=\.) (?=[A-Z])", " ".join(line.lstrip("# ") for line in lines))[0]
        say(f"{name:{width}}  {summary}".rstrip())
