from __future__ import annotations

from typing import Any

from trainfw.objectives import Objective, ObjectiveConfig, check_objective
from trainfw.optim import OptimizerConfig, OwnOptimizer
from trainfw.pieces import name_of, options_of
from trainfw.recipe import Recipe

_RATES = ("learning_rate", "schedule", "warmup_steps", "decay_steps", "final_fraction", "clip_norm")
"""Keys of `optimizer` that hold whatever the optimizer is."""


def name_pieces(recipe: Recipe, objective: Objective | None, optimizer: OwnOptimizer | None) -> Recipe:
    """Return a recipe that names the pieces which a script hands over, with the values that they were made with.

    So what a run records is true, and another piece is seen when it goes on. Raises UserError where one is none.
    """
    changed: dict[str, Any] = {}
    if objective is not None:
        changed["objective"] = ObjectiveConfig(name=name_of(objective), options=options_of(objective))
        with recipe.blamed("objective"):
            check_objective(objective, changed["objective"].name)
    if optimizer is not None:
        kept = {key: getattr(recipe.optimizer, key) for key in _RATES}
        changed["optimizer"] = OptimizerConfig(name=name_of(optimizer), options=options_of(optimizer), **kept)
    return recipe.model_copy(update=changed) if changed else recipe
