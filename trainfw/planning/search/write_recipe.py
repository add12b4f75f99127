"""The recipe that a search writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from trainfw.errors import UserError
from trainfw.planning.search.candidates import settings
from trainfw.planning.search.search import Found
from trainfw.recipe import Recipe, find_recipe, load_recipe
from trainfw.unfinished import write_text


def default_out(recipe: Recipe) -> Path:
    """Return the path at which the winner is written when none is given."""
    return Path(f"{recipe.name}-planned.yaml")


def check_out(file: Path, source: str | os.PathLike[str], *, named: bool) -> None:
    """Raises UserError where the winner, which extends `source`, cannot go to `file`: before the search, not after it.

    Where the user has not `named` it, it must not be there yet.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--out {file}: expected a file in a directory that exists")
    if file.exists() and file.samefile(find_recipe(source)):
        raise UserError(f"--out {file}: is the recipe itself, which the one to write extends; name another file")
    if file.exists() and not named:
        raise UserError(f"{file}: already there; name it with --out {file} to replace it, or name another")


def write_winner(found: Found, source: str | os.PathLike[str], file: Path) -> bool:
    """Write the winner to `file`, as a recipe that extends `source` (a path, or the name of a bundled recipe).

    Returns whether it was written: not where it is the recipe as it is.

    What overrides said is in it too. Where an extension cannot say it (it merges sections, and removes nothing), the
    recipe is written in full. Raises UserError where nothing fits, and where the file cannot be written.
    """
    if found.winner is None:
        raise UserError("nothing that was compiled fits in memory with some to spare: no recipe is written")
    if found.unchanged:
        return False
    candidate, made = found.winner
    recipe = candidate.recipe.model_copy(update={"name": f"{found.survey.recipe.name}-planned"})
    here, base = file.resolve().parent, find_recipe(source).resolve()
    extends = str(base.relative_to(here) if base.is_relative_to(here) else base)
    tree: dict[str, Any] = {"extends": extends, "name": recipe.name}
    before, chosen = load_recipe(source).model_dump(), settings(recipe)
    for section, values in recipe.model_dump().items():
        if not isinstance(values, dict):
            continue
        all_of_it = section == "model" and values["preset"] != before["model"]["preset"]
        said = {
            key: value
            for key, value in values.items()
            if all_of_it or value != before[section][key] or f"{section}.{key}" in chosen
        }
        if said:
            tree[section] = said
    head = (
        f"# Best by {found.survey.objective} of {len(found.plans)} layouts and programs that were compiled, out of "
        f"{found.survey.legal:,} that are legal: trainfw plan --search\n# Predicted: {made.time.seconds:.3g} s a step, "
        f"{made.memory.total / 2**30:.2f} GiB a core. Nothing was measured on this hardware.\n"
    )
    try:
        write_text(file, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    try:
        same = load_recipe(file) == recipe
    except UserError:
        same = False
    if not same:
        write_text(file, head + recipe.to_yaml())
    return True
