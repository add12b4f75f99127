"""Places of a given mesh's axes on the hardware: its devices stand for cores by their numbers, and nothing is
searched (see `placement` for a layout's)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainfw.errors import UserError
from trainfw.hardware import Dimension, Topology
from trainfw.parallel.placement import Piece, _part

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class MeshPlacement:
    """The pieces of the hardware that the axes of a mesh cover."""

    topology: Topology
    pieces: Mapping[str, tuple[Piece, ...]]
    """Axis -> these, innermost first."""


def place_mesh(topology: Topology, axes: Sequence[str], cores: np.ndarray) -> MeshPlacement:
    """Find what each axis of a mesh covers.

    Args:
        axes: names of the mesh's axes.
        cores: the core of every place in the mesh, shaped like it.

    Raises UserError for an axis whose groups are no rows, or boxes, of cores.
    """
    import numpy as np

    pieces = {}
    for number, axis in enumerate(axes):
        size = cores.shape[number]
        if size > 1:
            groups = np.unique(np.moveaxis(cores, number, -1).reshape(-1, size), axis=0)
            found = [_pieces(topology, axis, group) for group in groups.tolist()]
            pieces[axis] = min(found, key=lambda group: min(piece.bandwidth for piece in group))  # all wait for it
    return MeshPlacement(topology, pieces)


def _pieces(topology: Topology, axis: str, group: list[int]) -> tuple[Piece, ...]:
    places = [topology.coordinates(core) for core in group]
    along = {dim.name: sorted({place[dim.name] for place in places}) for dim in topology.dims}
    covered = math.prod(map(len, along.values()))
    steps = {name: {b - a for a, b in itertools.pairwise(spots)} for name, spots in along.items()}
    if covered != len(group) or any(len(step) > 1 for step in steps.values()):
        raise UserError(
            f"mesh axis {axis!r}: its devices stand for cores {', '.join(map(str, group[:8]))}"
            f"{', ...' * (len(group) > 8)} of {topology.name}, which are no row or box of cores at even steps, and no "
            "time is known for collectives among such; order the mesh's devices by core"
        )
    dims = [dim for dim in reversed(topology.dims) if len(along[dim.name]) > 1]
    return tuple(_piece(topology, dim, len(along[dim.name]), *steps[dim.name]) for dim in dims)


def _piece(topology: Topology, dim: Dimension, size: int, step: int) -> Piece:
    """`size` places of a dim that are `step` apart."""
    if size == dim.size:
        return _part(topology, dim.name)
    hops = dim.distance(0, step)
    links = 2 if dim.kind == "ring" and 2 * hops == dim.size else 1  # half way around there are two ways to go
    rate = dim.bandwidth if dim.kind == "chip" else dim.bandwidth * links / hops / topology.cores_per_chip
    return Piece(f"{dim.name}.{size}@{step}", dim.name, size, step, rate, dim.latency)
