"""Identity of runs: a run directory has an id, which all of the run's checkpoints carry, with copies of its recipe.

Imports nothing heavy.
"""

from __future__ import annotations

import importlib.metadata
import json
import stat
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainfw.errors import RunError, UserError
from trainfw.unfinished import write_text

FORMAT = 2
"""Format of run directories and their checkpoints. Format 1 names neither format nor id, and can still be opened."""

RUN_FILE = "run.json"

_MOST_BYTES = 2**24
"""Largest run.json that is read: trainfw writes none so large."""


@dataclass(frozen=True)
class Identity:
    """The run that a directory's checkpoints belong to."""

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Id, drawn when the run begins; a copy of the whole directory has the same."""
    older: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the manifests of checkpoints from before runs had ids, by step."""


def read_identity(run: Path) -> Identity | None:
    """Read the identity of a run directory; None where it has none yet.

    Raises UserError where a newer trainfw wrote the directory, RunError where run.json cannot be read.
    """
    file, too_large = run / RUN_FILE, False
    try:
        about = file.stat()  # a pipe would be waited on for ever
        too_large = about.st_size > _MOST_BYTES
        readable = stat.S_ISREG(about.st_mode) and not too_large
        content = json.loads(file.read_text(encoding="utf-8")) if readable else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        content = None
    content = content if isinstance(content, dict) else {}
    refuse_newer(content, run)
    name, older = content.get("run"), content.get("older", {})
    texts = isinstance(older, dict) and all(isinstance(text, str) for text in older.values())
    if not (isinstance(name, str) and name and texts):
        large = f" (it has more than {_MOST_BYTES:,} bytes)" if too_large else ""
        raise RunError(f"{file}: cannot be read{large}; remove it, and the run takes the id of its newest checkpoint")
    return Identity(name, older)


def write_identity(run: Path, identity: Identity) -> None:
    """Write run.json into a run directory; a crash leaves the whole file, or none."""
    write_text(run / RUN_FILE, json.dumps(stamp() | asdict(identity), indent=1) + "\n")


def stamp() -> dict[str, object]:
    """Return the format and the version of trainfw, with which run.json and manifests begin."""
    return {"format": FORMAT, "trainfw": importlib.metadata.version("trainfw")}


def refuse_newer(content: Mapping[str, object], where: object) -> None:
    """Raise UserError where the file's format (see `stamp`) is one that this version does not know."""
    number, version = content.get("format"), content.get("trainfw")
    if isinstance(number, int) and number > FORMAT and isinstance(version, str):
        raise UserError(
            f"{where}: was written by trainfw {version[:40]!s} (format {number}); this is trainfw "
            f"{stamp()['trainfw']}, which knows formats up to {FORMAT}: upgrade it, with pip install --upgrade trainfw"
        )


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
