"""Places of the mesh that cores, chips and links belong to, and the colours of its axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trainfw.hardware import Dimension
from trainfw.parallel import AXES, Placement, runs

if TYPE_CHECKING:
    import numpy as np

# Of one lightness, so that they read on light and dark alike.
COLOURS = {
    "pipeline": "#d6478f",
    "data": "#9061d8",
    "fsdp": "#3b82e0",
    "expert": "#b7841a",
    "context": "#2a9d68",
    "tensor": "#e0552f",
}


def mesh_positions(placement: Placement) -> dict[str, np.ndarray]:
    """Map each axis larger than 1 to the place of every physical core along it, an int array (cores,)."""
    import numpy as np

    places = np.indices(placement.order.shape).reshape(placement.order.ndim, -1)
    by_core = np.empty_like(places)
    by_core[:, placement.order.ravel()] = places
    return {axis: by_core[i] for i, axis in enumerate(AXES) if placement.layout.sizes[axis] > 1}


def axes_between(placement: Placement, positions: dict[str, np.ndarray], a: int, b: int) -> list[str]:
    """List the axes along which one moves from chip `a` to chip `b`, the one with the most communication first."""
    per_chip = placement.topology.cores_per_chip
    mine, theirs = slice(a * per_chip, (a + 1) * per_chip), slice(b * per_chip, (b + 1) * per_chip)
    return [axis for axis in reversed(positions) if (positions[axis][mine] != positions[axis][theirs]).any()]


def axes_of_dim(placement: Placement, dim: str) -> list[str]:
    """List the axes that lie on a dim or on parts of it, the one with the most communication first."""
    found = [axis.axis for axis in placement.axes if dim in {part.split(".")[0] for part in axis.parts}]
    return sorted(found, key=AXES.index, reverse=True)


def spans(numbers: Iterable[int], most: int = 11) -> str:
    """Write `0-3`, `0-3,12-15`, or how many there are when that is longer than `most` characters."""
    distinct = set(map(int, numbers))
    text = ",".join(runs(distinct))
    return text if len(text) <= most else f"{len(distinct)} of them"


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)] or [items]


def kind_in_words(dim: Dimension) -> str:
    """Write `ring of 4`."""
    if dim.kind == "chip":
        return "cores of a chip"
    return "pair" if dim.kind == "ring" and dim.size == 2 else f"{dim.kind} of {dim.size}"


def part_in_words(part: str) -> str:
    """Name a part of an evenly divided dim: `4 of gpu`, `2 of gpu, 4 apart`; other parts have their own names."""
    dim, _, piece = part.partition(".")
    size, _, stride = piece.partition("@")
    if not size.isdigit():
        return part
    return f"{size} of {dim}, {stride} apart" if stride else f"{size} of {dim}"
