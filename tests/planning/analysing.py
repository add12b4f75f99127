"""The analysis of a recipe's step, compiled in this process."""

from trainfw import backends
from trainfw.hlo import Partitioned
from trainfw.planning import Analysis
from trainfw.planning.read_step import analysis
from trainfw.program import Program
from trainfw.recipe import Recipe


def analyse(recipe: Recipe, *, most: int = backends.MAX_SIMULATED) -> tuple[Analysis, Program, Partitioned]:
    """The analysis at full size, with the program (shortened for `most` devices) and its compilation."""
    found = analysis.simulation(recipe, most)
    program = analysis.simulated_program(found)
    partitioned = analysis.compile_step(program)
    small = analysis.read(partitioned.module, program.mesh, found.simulated)
    return analysis.lengthened(small, found.simulated, found.layout), program, partitioned
