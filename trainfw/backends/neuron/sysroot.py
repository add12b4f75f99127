"""The machine's files, read below `TRAINFW_SYSROOT` where that is set: a directory that stands for `/`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from trainfw.errors import UserError

VARIABLE = "TRAINFW_SYSROOT"
COMPILER = "neuronx-cc"

_ALLOCATORS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib")
"""Directories in which Ubuntu's libgoogle-perftools4 and Amazon Linux's gperftools-libs put libtcmalloc."""


def sysroot(environ: Mapping[str, str]) -> Path:
    """Return `$TRAINFW_SYSROOT`, or `/`. Raises UserError where that is no directory."""
    root = Path(environ.get(VARIABLE) or "/")
    if not root.is_dir():
        raise UserError(f"{VARIABLE} = {root}: expected a directory that stands for /")
    return root


def below(root: Path, path: str | os.PathLike[str]) -> Path:
    """Return an absolute path of the machine, below `root`."""
    return root / os.fspath(path).lstrip("/")


def find_command(name: str, directories: Iterable[str], root: Path) -> str | None:
    """Find the path of a command in `directories`, in order, as a child process does; None where it is not there."""
    for directory in directories:
        file = below(root, directory) / name
        if directory and file.is_file() and os.access(file, os.X_OK):
            return os.path.join(directory, name)
    return None


def compiler_path(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return (neuronx-cc as a child process finds it or None, the directory to put before others of PATH or None).

    libneuronxla calls it by bare name: the one of this environment must come first, wherever PATH does not say so.
    """
    root = sysroot(environ)
    found = find_command(COMPILER, environ.get("PATH", os.defpath).split(os.pathsep), root)
    own = find_command(COMPILER, [os.path.dirname(sys.executable)], root)  # where pip puts it
    return found, None if own is None or found == own else os.path.dirname(own)


def find_tcmalloc(root: Path) -> str | None:
    """Return the newest libtcmalloc.so of the machine, to be preloaded; None where there is none."""
    for directory in _ALLOCATORS:
        if found := sorted(below(root, directory).glob("libtcmalloc.so.*")):
            return f"/{directory}/{found[-1].name}"
    return None
