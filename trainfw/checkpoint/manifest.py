"""What a checkpoint's files are: one that a disk, a copy or a crash changed is seen.

By size and SHA-256; in an object store, which does not return other bytes than it was given, by size and the store's
own tag, for which nothing is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainfw.checkpoint.stores import COMMITTED, Directory, in_store, list_store

MANIFEST = "manifest.json"

_LATER = {MANIFEST, "_CHECKPOINT_METADATA", COMMITTED}
"""Files not in the manifest: itself, and Orbax's notes of when the checkpoint was committed."""

_THREADS = 4
"""hashlib lets go of the interpreter's lock: one thread reads while another computes."""


def write_manifest(directory: Directory) -> None:
    """Describe the files under `directory`, which are all there, in one file beside them."""
    files = inventory(directory)
    manifest = {"place": str(directory), "tag": files} if in_store(directory) else {"sha256": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=0), encoding="utf-8")


def inventory(directory: Directory) -> dict[str, tuple[int, str]]:
    """(bytes, SHA-256 or the store's tag) of every file of a checkpoint, by name."""
    if in_store(directory):
        return {name: about for name, about in sorted(list_store(directory).items()) if name not in _LATER}
    return {name: _describe(directory / name) for name in _names(directory)}


def find_damage(directory: Directory, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words, or None where every file is what it was when it was saved.

    Of one that was copied from or to a store, which has other tags, sizes alone are compared.

    Args:
        share: look at the files of this share alone, of `shares` equal ones.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        key = "sha256" if "sha256" in manifest else "tag"
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest[key].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not files:
        return f"{MANIFEST} lists no files"
    if in_store(directory):
        copied = manifest.get("place") != str(directory)
        return next(_differences(inventory(directory), files, copied), None)
    mine = dict(sorted(files.items())[share::shares])
    if key == "tag":
        there = {name: ((directory / name).stat().st_size, "") for name in mine if (directory / name).is_file()}
        return next(_differences(there, mine, True), None)
    return next(_damages(directory, mine), None)


def _differences(
    found: Mapping[str, tuple[int, str]], saved: Mapping[str, tuple[int, str]], sizes_alone: bool
) -> Iterator[str]:
    for name, (size, tag) in saved.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name][0] != size:
            yield f"{name} has {found[name][0]:,} bytes, not {size:,}"
        elif not sizes_alone and found[name][1] != tag:
            yield f"{name} is not what was saved (its tag differs)"


def _damages(directory: Directory, files: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(files, pool.map(lambda name: _found(directory / name, files[name][0]), files)):
            if isinstance(found, str):
                yield f"{name} {found}"
            elif found != files[name]:
                yield f"{name} is not what was saved (its SHA-256 differs)"


def _found(path: Directory, size: int) -> tuple[int, str] | str:
    try:
        actual = path.stat().st_size
        if actual != size:  # without reading it
            return f"has {actual:,} bytes, not {size:,}"
        return _describe(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _describe(path: Directory) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _names(directory: Directory) -> list[str]:
    paths: Any = (path for path in directory.rglob("*") if path.is_file() and path.name not in _LATER)
    return sorted(path.relative_to(directory).as_posix() for path in paths)
