from __future__ import annotations

from typing import TYPE_CHECKING

from trainfw.objectives.next_token import NextToken
from trainfw.objectives.objective import Objective

if TYPE_CHECKING:
    from trainfw.recipe import Recipe


def make_objective(recipe: Recipe) -> Objective:
    """Return what a recipe's model learns."""
    return NextToken(recipe.train.loss_chunk, recipe.data.mask_documents, recipe.train.z_loss)
