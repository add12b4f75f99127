"""What a checkpoint's files are, by size and SHA-256: a file that a disk, a copy or a crash changed is seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

_LATER = {MANIFEST, "_CHECKPOINT_METADATA"}
"""Files not in the manifest: itself, and Orbax's note of when the checkpoint was committed."""

_THREADS = 4
"""hashlib lets go of the interpreter's lock: one thread reads while another computes."""


def write_manifest(directory: Path) -> None:
    """Describe the files under `directory`, which are all there, in one file beside them."""
    files = {name: _describe(directory / name) for name in _names(directory)}
    (directory / MANIFEST).write_text(json.dumps({"sha256": files}, indent=0), encoding="utf-8")


def find_damage(directory: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words, or None where every file is what it was when it was saved.

    Args:
        share: look at the files of this share alone, of `shares` equal ones.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["sha256"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not files:
        return f"{MANIFEST} lists no files"
    return next(_damages(directory, dict(sorted(files.items())[share::shares])), None)


def _damages(directory: Path, files: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(files, pool.map(lambda name: _found(directory / name, files[name][0]), files)):
            if isinstance(found, str):
                yield f"{name} {found}"
            elif found != files[name]:
                yield f"{name} is not what was saved (its SHA-256 differs)"


def _found(path: Path, size: int) -> tuple[int, str] | str:
    try:
        actual = path.stat().st_size
        if actual != size:  # without reading it
            return f"has {actual:,} bytes, not {size:,}"
        return _describe(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _describe(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _names(directory: Path) -> list[str]:
    paths: Any = (path for path in directory.rglob("*") if path.is_file() and path.name not in _LATER)
    return sorted(path.relative_to(directory).as_posix() for path in paths)
