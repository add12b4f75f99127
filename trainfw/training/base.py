from __future__ import annotations

from trainfw.errors import UserError
from trainfw.objectives import Objective
from trainfw.program import objective_of
from trainfw.recipe import Recipe
from trainfw.training.run_directory import RunDirectory
from trainfw.weights import open_base, other_base


def check_base(
    recipe: Recipe, run: RunDirectory, resumed_step: int | None, objective: Objective | None = None
) -> dict[str, str] | None:
    """Return what a run starts from, or what is frozen in it: `path` and `hash` of the weights; None: from a seed.

    `objective` is one that a script hands over. Raises UserError where the run to resume has other weights.
    """
    path = recipe.model.from_
    before = None if resumed_step is None else run.saved_meta().get("base")
    roles = (objective or objective_of(recipe)).roles
    if recipe.adapter is None and not roles and resumed_step is not None:
        return _check_start(recipe, run, before)
    part = "adapter" if recipe.adapter is not None else "model"
    if path is None:
        if before is not None:
            raise UserError(
                f"{run}: its {part} was trained on {before['path']}, but this recipe draws its base from a seed; set "
                f"model.from={before['path']}"
            )
        return None
    with recipe.blamed("model.from"):
        base = {"path": path, "hash": open_base(path).fingerprint()}
        if resumed_step is not None and before is None:
            raise UserError(f"{path}: the {part} in {run} was trained on a base drawn from a seed, not on a model")
        if before is not None and before["hash"] != base["hash"]:
            raise UserError(other_base(str(run), before, path, base["hash"]))
    return base


def _check_start(recipe: Recipe, run: RunDirectory, before: dict[str, str] | None) -> dict[str, str] | None:
    """`before`, of a run that trains all weights: what it started from is not read again, and may be gone.

    Raises UserError where the recipe names other weights than those, which the run would never see.
    """
    path, started = recipe.model.from_, run.stored_recipe().model.from_
    if path is None or path == started:
        return before
    with recipe.blamed("model.from"):
        if started is None:
            raise UserError(f"{path}: {run} started from a seed, and goes on with its own weights; start another run")
        found = open_base(path).fingerprint()
        if before is not None and before["hash"] != found:
            raise UserError(
                f"{path}: {run} started from other weights, of {before['path']}, and goes on with its own; start "
                f"another run with name=... or run_dir (--run-dir)"
            )
    return before
