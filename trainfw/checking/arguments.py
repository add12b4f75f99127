"""Arguments of checks and plans: the hardware that they are for, and what goes with a function alone."""

from __future__ import annotations

from trainfw.backends import MAX_SIMULATED
from trainfw.errors import UserError
from trainfw.hardware import Topology, load_topology, topology_names
from trainfw.recipe import Recipe


def hardware_of_function(hardware: str | Topology | None, count: int | None, lnc: int | None) -> Topology:
    """The topology that a function is read for."""
    if isinstance(hardware, Topology):
        return hardware
    return load_topology(
        "trn2-ultraserver" if hardware is None else hardware, count=1 if count is None else count, lnc=lnc
    )


def refuse_arguments(abstract_args: tuple[object, ...], mesh: object) -> None:
    """Raise UserError for what only a function takes, where a recipe is given."""
    if abstract_args or mesh is not None:
        given = "mesh" if mesh is not None else f"{abstract_args[0]!r:.60}"
        raise UserError(
            f"{given}: goes with a function, and a recipe is given, which says both; change it with "
            "trainfw.load_recipe(recipe, {'train.steps': 5})"
        )


def topology_to_check(recipe: Recipe) -> Topology:
    """The hardware of a recipe. Raises UserError where it names none, or more cores than can be simulated."""
    topology = recipe.hardware.load()
    if topology is None:
        names = ", ".join(topology_names())
        raise recipe.error("hardware.topology", f"nothing to check for; expected one of {names}")
    if topology.cores > MAX_SIMULATED:
        raise recipe.error(
            "hardware.count",
            f"{topology.name} x {topology.count} has {topology.cores:,} cores; a check simulates {MAX_SIMULATED:,} at "
            f"most; try count={MAX_SIMULATED * topology.count // topology.cores}",
        )
    return topology
