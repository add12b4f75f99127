"""Which run a checkpoint belongs to: a run directory has an id, and so has every checkpoint of the run."""

from __future__ import annotations

import importlib.metadata
import json
import stat
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainfw.errors import RunError, UserError
from trainfw.unfinished import write_text

FORMAT = 2
"""Format of run directories and their checkpoints. Those of format 1 name neither format nor id, and open as well."""

RUN_FILE = "run.json"

_MOST_BYTES = 2**24
"""Of run.json: more is none of ours."""


@dataclass(frozen=True)
class Identity:
    """The run that a directory's checkpoints belong to."""

    run: str
    """Drawn when the run begins; a copy of the whole directory has the same."""
    older: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the manifest of each checkpoint from before there were ids, by step."""


def new_identity(older: Mapping[str, str] | None = None) -> Identity:
    return Identity(uuid.uuid4().hex, older or {})


def read_identity(run: Path) -> Identity | None:
    """Return the identity of a run directory; None where it has none yet.

    Raises UserError where a newer trainfw wrote the directory, RunError where the file says nothing.
    """
    file, too_large = run / RUN_FILE, False
    try:
        about = file.stat()  # a pipe would be waited on for ever
        too_large = about.st_size > _MOST_BYTES
        readable = stat.S_ISREG(about.st_mode) and not too_large
        held = json.loads(file.read_text(encoding="utf-8")) if readable else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        held = None
    held = held if isinstance(held, dict) else {}
    refuse_newer(held, run)
    name, older = held.get("run"), held.get("older", {})
    if not (isinstance(name, str) and name and _is_texts(older)):
        large = f" (it has more than {_MOST_BYTES:,} bytes)" if too_large else ""
        raise RunError(f"{file}: cannot be read{large}; remove it, and the run takes the id of its newest checkpoint")
    return Identity(name, older)


def write_identity(run: Path, identity: Identity) -> None:
    """Keep it in a run directory: a crash leaves the whole file, or none."""
    write_text(run / RUN_FILE, json.dumps(stamp() | asdict(identity), indent=1) + "\n")


def stamp() -> dict[str, object]:
    """The format, and the version that wrote it."""
    return {"format": FORMAT, "trainfw": importlib.metadata.version("trainfw")}


def refuse_newer(held: Mapping[str, object], where: object) -> None:
    """Raise UserError where `held`, which `stamp` began, is of a format that this version does not know."""
    found, version = held.get("format"), held.get("trainfw")
    if isinstance(found, int) and found > FORMAT and isinstance(version, str):
        raise UserError(
            f"{where}: was written by trainfw {version[:40]!s} (format {found}); this is trainfw "
            f"{stamp()['trainfw']}, which knows formats up to {FORMAT}: upgrade it, with pip install --upgrade trainfw"
        )


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
