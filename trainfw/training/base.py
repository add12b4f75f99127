from __future__ import annotations

from trainfw.checkpoint import SavedParameters
from trainfw.errors import UserError
from trainfw.program import open_base, other_base
from trainfw.recipe import Recipe
from trainfw.training.run_directory import RunDirectory


def check_base(recipe: Recipe, run: RunDirectory, resumed_step: int | None) -> dict[str, str] | None:
    """What an adapter is trained on, `path` and `hash` of its weights.

    Raises UserError where the run to resume was trained on other weights.
    """
    if recipe.adapter is None or recipe.model.from_ is None:
        return None
    path = recipe.model.from_
    with recipe.blamed("model.from"):
        base = {"path": path, "hash": open_base(path).fingerprint()}
        if resumed_step is not None:
            before = SavedParameters(run.checkpoints / str(resumed_step)).meta["base"]
            if before["hash"] != base["hash"]:
                raise UserError(other_base(str(run), before, path, base["hash"]))
    return base
