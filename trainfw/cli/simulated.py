"""A recipe's program, built on the CPU for hardware that is not there: what `check` and `export-hlo` read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainfw import backends, checking, hardware, program
from trainfw import recipe as recipes
from trainfw.cli.options import load_for
from trainfw.errors import UserError


def load_simulated(
    recipe: str, overrides: Sequence[str], hardware: str | None, count: int | None, stage: int | None = None
) -> tuple[recipes.Recipe, hardware.Topology]:
    """Load a recipe for its own hardware, or for what the command line names.

    Raises UserError where neither names a topology, and for one of more cores than can be simulated.
    """
    loaded = load_for(recipe, overrides, hardware, count, stage)
    return loaded, checking.topology_to_check(loaded)


def compiler_options(recipe: recipes.Recipe, topology: hardware.Topology) -> list[str]:
    """Choose neuronx-cc's options for the recipe's hardware. Raises UserError where it does not compile for that."""
    from trainfw import backends

    if not backends.for_topology(topology).has_sdk:
        raise recipe.error("hardware.topology", "neuronx-cc compiles for Neuron hardware only")
    flags = backends.compiler_flags(recipe.hardware)
    if not any(flag.startswith("--target") for flag in flags):
        raise UserError(
            f"hardware.topology = {topology.name!r}: no --target of neuronx-cc is known for it; give the one that "
            "`neuronx-cc compile --help` lists: hardware.compiler_flags=[--target=...]"
        )
    return flags


def build_for(recipe: recipes.Recipe, topology: hardware.Topology, progress: Callable[[str], None]) -> program.Program:
    """Build the recipe's program on as many simulated devices as the topology has cores. Starts jax."""
    backends.prepare(topology.cores, as_backend=topology.rules)
    progress(f"building {recipe.name} for {topology.cores} cores")
    return program.build_program(recipe)
