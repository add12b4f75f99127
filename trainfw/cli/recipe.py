from __future__ import annotations

import itertools
import re

import typer

from trainfw.cli.options import Overrides, RecipeCommand, RecipePath
from trainfw.cli.terminal import say

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command(cls=RecipeCommand)
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the resolved recipe as YAML, every key written out."""
    from trainfw.recipe import COMMAND_LINE, load_recipe

    typer.echo(load_recipe(recipe, overrides or (), written=COMMAND_LINE).to_yaml(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from trainfw.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command("list")
def list_() -> None:
    """List the bundled recipes."""
    from trainfw.recipe import bundled_recipes

    recipes = bundled_recipes()
    width = max((len(name) for name in recipes), default=0)
    for name, path in recipes.items():
        say(f"{name:{width}}  {_summary(path.read_text(encoding='utf-8'))}".rstrip())


def _summary(recipe: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(line.lstrip("# ") for line in lines))[0]
