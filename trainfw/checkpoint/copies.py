"""Copies of a run's recipe in its checkpoints, for when its own file is lost. Imports nothing heavy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from trainfw.errors import UserError


def saved_recipe(file: Path) -> dict[str, Any] | None:
    """Return the newest whole checkpoint's copy of a run's recipe.yaml, with a warning, where that file is empty.

    A loss of power may leave an empty file. Returns None for a file that is not empty, or belongs to no run. Raises
    UserError where there is no copy.
    """
    if file.name != "recipe.yaml" or not (file.parent / "metrics.jsonl").is_file():
        return None
    with file.open("rb") as stream:
        if stream.read(2**16).strip(b"\0 \r\n"):
            return None
    from trainfw.checkpoint.manifest import find_mismatch, read_meta

    directories = (file.parent / "checkpoints").glob("[0-9]*")
    steps = {int(directory.name): directory for directory in directories if directory.name.isdecimal()}
    for step, directory in sorted(steps.items(), reverse=True):
        if find_mismatch(directory) is None and (tree := read_meta(directory).get("recipe")):
            warnings.warn(f"{file}: is empty; the recipe that checkpoint {step} holds serves", stacklevel=1)
            return dict(tree)
    raise UserError(
        f"{file}: is empty, and no checkpoint beside it holds the recipe: delete it, and go on with the recipe that "
        "the run was begun with"
    )
