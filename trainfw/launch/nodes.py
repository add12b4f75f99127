from __future__ import annotations

from trainfw.errors import UserError
from trainfw.recipe import Recipe


def count_nodes(recipe: Recipe, nodes: int | None) -> int:
    """`--nodes`, or the instances of the recipe's topology. Raises UserError where the two contradict each other."""
    topology = recipe.hardware.load()
    count = nodes if nodes is not None else topology.instances if topology is not None else 1
    if count < 1:
        raise UserError(f"--nodes {count}: expected at least 1")
    if topology is not None and topology.rules == "neuron" and count != topology.instances:
        raise recipe.error(
            "hardware.count",
            f"{topology.count} x {topology.name} is {topology.instances} instances, not --nodes {count}",
        )
    return count
