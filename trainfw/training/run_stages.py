"""Stages of a run as programs: each shape of rows and batch is compiled once, when the run comes to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from trainfw.errors import UserError
from trainfw.program import Program
from trainfw.recipe import Recipe, Stage
from trainfw.training.compiling import Compiling
from trainfw.training.phases import Phases
from trainfw.training.reporter import Reporter


def stage_programs(recipe: Recipe, build: Callable[[Recipe], Program]) -> list[Program]:
    """Build the program of every stage, one for all that have the same shapes.

    Raises UserError, with the stage's number, where one does not fit together.
    """
    built: dict[tuple[int, int, int], Program] = {}
    for stage in recipe.in_stages():
        if stage.shape in built:
            continue
        try:
            built[stage.shape] = build(stage.recipe)
        except UserError as error:
            if len(recipe.stages) < 2 or stage.number == 1:
                raise
            raise UserError(f"{recipe.written('stages') or 'stages'}: stage {stage.number}: {error}") from None
    return [built[stage.shape] for stage in recipe.in_stages()]


def number_at(stages: Sequence[Stage], step: int) -> int:
    """Return the number, from 0, of the stage that the step after `step` is in; the last one's past the end."""
    return next((i for i, stage in enumerate(stages) if step < stage.end), len(stages) - 1)


def check_stage(recipe: Recipe, begun: int, step: int) -> None:
    """Raise UserError where a checkpoint of `step` is of a stage (a number from 0) that the recipe has elsewhere."""
    stages = recipe.in_stages()
    if begun >= len(stages) or not stages[begun].first <= step <= stages[begun].end:
        raise UserError(
            f"the run was in its stage {begun + 1} at step {step:,}, which the recipe puts into stage "
            f"{number_at(stages, step) + 1}; where train.steps has changed, give the ends of stages in steps"
        )


class RunStages(contextlib.ExitStack):
    """The stages of a run, one of which is the current one; as a context it stops compiling."""

    def __init__(self, recipe: Recipe, programs: Sequence[Program], reporter: Reporter, phases: Phases) -> None:
        super().__init__()
        self.recipe = recipe
        """The run's, of which each program has a stage's."""
        self._stages, self._programs, self._reporter, self._phases = recipe.in_stages(), programs, reporter, phases
        self._compiling: dict[int, Compiling] = {}
        self.number = 0

    def enter(self, step: int) -> None:
        """Go to the stage that comes after `step`, and begin to compile it unless that was done."""
        self.number = number_at(self._stages, step)
        program = self.program
        if id(program) not in self._compiling:
            trains = step < self._stages[-1].end
            compiling = Compiling(program, self._reporter, self._phases, trains=trains)
            self._compiling[id(program)] = self.enter_context(compiling)

    @property
    def current(self) -> Stage:
        return self._stages[self.number]

    @property
    def program(self) -> Program:
        return self._programs[self.number]

    @property
    def compiling(self) -> Compiling:
        return self._compiling[id(self.program)]

    def train_step(self) -> Any:
        return self.compiling.train_step()

    def count_before(self) -> int:
        """Count the tokens, or pictures, of the steps before the current stage."""
        return sum(stage.steps * stage.recipe.counted[1] for stage in self._stages[: self.number])
