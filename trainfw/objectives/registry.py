from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from trainfw.errors import UserError
from trainfw.objectives.next_token import NextToken
from trainfw.objectives.objective import Objective
from trainfw.objectives.preference import Preference, PreferenceLoss

if TYPE_CHECKING:
    from trainfw.recipe import Recipe


def make_objective(recipe: Recipe) -> Objective:
    """Return what a recipe's model learns."""
    config, train = recipe.objective, recipe.train
    if ":" in config.name:
        return _own(recipe)
    if config.name == "next_token":
        return NextToken(train.loss_chunk, recipe.data.mask_documents, train.z_loss)
    return Preference(
        cast(PreferenceLoss, config.name),
        config.beta_or_default,
        config.margin,
        recipe.data.pairs_per_row,
        train.loss_chunk,
    )


def _own(recipe: Recipe) -> Objective:
    """Return the objective of somebody's own, `package.module:Name`, made of its options."""
    module, _, name = recipe.objective.name.partition(":")
    with recipe.blamed("objective.name"):
        try:
            made = getattr(importlib.import_module(module), name)(**recipe.objective.options)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"{recipe.objective.name}: cannot be made: {error}") from error
    for method in ("schema", "loss", "roles", "unit"):
        if not hasattr(made, method):
            raise recipe.error("objective.name", f"has no {method}; expected a trainfw.objectives.Objective")
    return made
