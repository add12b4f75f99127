"""What checkpoints hold of a run beside its arrays, where the run's own file is lost. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

from trainfw.errors import UserError
from trainfw.paths import check_file

_META_BYTES = 2**24


def saved_recipe(file: Path) -> dict[str, Any] | None:
    """Of a run's recipe.yaml that is empty, as a loss of power leaves a file, the newest checkpoint's copy.

    It is warned of. None for a file that is of no run, or not empty. Raises UserError where there is no copy.
    """
    if file.name != "recipe.yaml" or not (file.parent / "metrics.jsonl").is_file():
        return None
    with file.open("rb") as stream:
        if stream.read(2**16).strip(b"\0 \r\n"):
            return None
    copies = (file.parent / "checkpoints").glob("[0-9]*/meta/metadata")
    steps = {int(name): copy for copy in copies if (name := copy.parents[1].name).isdecimal()}
    for step, copy in sorted(steps.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
            check_file(copy)
            with copy.open("rb") as stream:
                tree = json.loads(stream.read(_META_BYTES))["recipe"]
            if isinstance(tree, dict) and tree:
                warnings.warn(f"{file}: is empty; the recipe that checkpoint {step} holds serves", stacklevel=1)
                return tree
    raise UserError(
        f"{file}: is empty, and no checkpoint beside it holds the recipe: delete it, and go on with the recipe that "
        "the run was begun with"
    )
