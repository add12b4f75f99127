from __future__ import annotations

from trainfw.errors import UserError
from trainfw.program import open_base, other_base
from trainfw.recipe import Recipe
from trainfw.training.run_directory import RunDirectory


def check_base(recipe: Recipe, run: RunDirectory, resumed_step: int | None) -> dict[str, str] | None:
    """What an adapter is trained on, `path` and `hash` of its weights.

    Raises UserError where the run to resume was trained on other weights.
    """
    if recipe.adapter is None:
        return None
    path = recipe.model.from_
    before = None if resumed_step is None else run.saved_meta().get("base")
    if path is None:
        if before is not None:
            raise UserError(
                f"{run}: its adapter was trained on {before['path']}, but this recipe draws its base from a seed; set "
                f"model.from={before['path']}"
            )
        return None
    with recipe.blamed("model.from"):
        base = {"path": path, "hash": open_base(path).fingerprint()}
        if resumed_step is not None and before is None:
            raise UserError(f"{path}: the adapter in {run} was trained on a base drawn from a seed, not on a model")
        if before is not None and before["hash"] != base["hash"]:
            raise UserError(other_base(str(run), before, path, base["hash"]))
    return base
