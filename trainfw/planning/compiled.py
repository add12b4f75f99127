"""What a plan knows of a recipe's step once it has been compiled; nothing of it depends on the hardware's figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainfw import backends
from trainfw.planning.analysis import Analysis, analyse
from trainfw.planning.memory import MemoryTable, memory_table
from trainfw.recipe import Recipe


@dataclass(frozen=True)
class Compiled:
    analysis: Analysis
    memory: MemoryTable
    """Without what the runtime of a core takes (see `MemoryTable.on`)."""


def compiled(
    recipe: Recipe, progress: Callable[[str], None] = lambda _: None, *, most: int = backends.MAX_SIMULATED
) -> Compiled:
    """Compile the training step of `recipe` for its topology on simulated devices, which this process must have.

    Args and errors are those of `analyse`.
    """
    analysis, program, partitioned = analyse(recipe, progress, most=most)
    return Compiled(analysis, memory_table(program, partitioned))
