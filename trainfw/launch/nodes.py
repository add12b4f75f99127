from __future__ import annotations

import os
from collections.abc import Sequence

from trainfw.backends import for_topology
from trainfw.config import name_problem
from trainfw.errors import UserError
from trainfw.recipe import Recipe
from trainfw.training import check_accept


def count_nodes(recipe: Recipe, nodes: int | None) -> int:
    """Count `--nodes`, or the instances of the recipe's topology. Raises UserError where the two disagree."""
    topology = recipe.hardware.load()
    count = nodes if nodes is not None else topology.instances if topology is not None else 1
    if count < 1:
        raise UserError(f"--nodes {count}: expected at least 1")
    if topology is not None and for_topology(topology).one_process_an_instance and count != topology.instances:
        problem = f"{topology.count} x {topology.name} is {topology.instances} instances, not --nodes {count}"
        raise recipe.error("hardware.count", problem)
    return count


def accepting(keys: Sequence[str]) -> list[str]:
    """List the options of `trainfw train` that accept other values of keys. Raises UserError for unknown keys."""
    check_accept(keys)
    return [word for key in keys for word in ("--accept", key)]


def check_name(option: str, text: str | None) -> None:
    """Refuse a name or a path that an option gives and that cannot be one. Raises UserError."""
    if text is not None and (problem := name_problem(text)):
        raise UserError(f"{option} {text!r:.80}: {problem}")


def as_argument(path: str) -> str:
    """Write a path for a command, which would read one that begins with a dash as an option."""
    return os.path.join(os.curdir, path) if path.startswith("-") else path
