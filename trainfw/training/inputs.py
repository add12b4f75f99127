"""What of a recipe can be seen to be missing before JAX is there, let alone a model compiled."""

from __future__ import annotations

from trainfw.data import check_source
from trainfw.recipe import Recipe


def check_inputs(recipe: Recipe) -> None:
    """Raise UserError, with the key and where it was written, where the data or the tokenizer is not there."""
    if recipe.evaluation is not None and recipe.data.format == "text":
        raise recipe.error("evaluation.metric", "needs prompts and references: data.format chat or prompt_completion")
    with recipe.blamed("data"):
        check_source(recipe.data)
