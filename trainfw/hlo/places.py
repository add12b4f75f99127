"""Places in user code, out of the stack frames that JAX and XLA keep of every operation."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass

LIBRARIES = frozenset({"jax", "jaxlib", "flax", "optax", "chex", "orbax", "einops", "numpy"})
"""Packages whose frames are never where somebody made a mistake in their own program."""


@dataclass(frozen=True, order=True)
class Place:
    """A line of Python."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@functools.cache
def is_library(file: str) -> bool:
    """Tell whether a file belongs to Python itself or to one of LIBRARIES."""
    parts = file.split(os.sep)
    for installed in ("site-packages", "dist-packages"):
        if installed in parts:
            return parts[parts.index(installed) + 1] in LIBRARIES
    return file.startswith((sysconfig.get_path("stdlib") + os.sep, "<frozen"))


def user_place(frames: Iterable[Place]) -> Place | None:
    """Choose the innermost of `frames` (given innermost first) in user code, else the innermost; None of none."""
    frames = list(frames)
    return next((frame for frame in frames if not is_library(frame.file)), frames[0] if frames else None)
