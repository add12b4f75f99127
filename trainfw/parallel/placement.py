"""Places of the mesh axes on the hardware, hence the order of devices in the mesh.

Not a table of cases but a search. The cores of the topology stand in physical dimensions (cores of a chip, columns
and rows of chips, nodes of an UltraServer, the network). An assignment gives every dimension, or every part of one,
to a mesh axis. Inside an instance only the assignments are tried whose groups documents list (where none does: the
axes one inside the other); outside it any division. Of all that fit the layout, the one is taken that is predicted to
spend the least time waiting for collectives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from trainfw.backends import for_topology
from trainfw.errors import UserError
from trainfw.hardware import Dimension, Topology
from trainfw.parallel.config import AXES
from trainfw.parallel.groups import group_problem
from trainfw.parallel.layout import Layout

EXPOSED = {"fsdp": 0.5, "data": 0.5, "pipeline": 0.5}
"""Share of an axis's time on collectives that a step waits for (1 where it is left out), an assumption: collectives of
parameters, and those between stages, run beside compute that does not need them."""

PERMUTED_AXES = ("pipeline", "context")
"""Axes whose collectives are permutes from each place to the next: these follow direct links."""


@dataclass(frozen=True)
class Piece:
    """A physical dimension, or a part of it, as one mesh axis covers it."""

    name: str
    """`row`, or `row.pair` for a part."""
    dim: str
    size: int
    stride: int
    """Distance of neighbouring places of the part in the dim, for a part without a table."""
    bandwidth: float
    """Bytes/s between two of its places, each core's share."""
    latency: float


Assignment: TypeAlias = dict[str, tuple[Piece, ...]]
"""Axis -> the pieces it covers, innermost first."""


@dataclass(frozen=True)
class AxisPlacement:
    """Place of one mesh axis on the hardware."""

    axis: str
    size: int
    parts: tuple[str, ...]
    """Physical dimensions (or parts of them) that it covers, innermost first."""
    pieces: tuple[Piece, ...]
    """Parts with their sizes and rates."""
    ring: bool
    """True where its cores can be walked in a closed ring over direct links."""
    permutes: bool
    """The order of its devices is such a ring: a permute from each to the next is legal."""
    hops: int
    """Links between the two farthest chips of a group."""
    bandwidth: float
    """Bytes/s of one core over the slowest links that it crosses."""
    problem: str | None
    """Reason why Neuron refuses its groups. (None in what `place` returns.)"""
    documented: bool
    """True where documents list its groups, rather than merely not speaking against them."""


@dataclass(frozen=True)
class MeshPlacement:
    """The pieces of the hardware that the axes of a mesh cover."""

    topology: Topology
    pieces: Mapping[str, tuple[Piece, ...]]
    """Axis -> these, innermost first."""


@dataclass(frozen=True, repr=False)
class Placement:
    topology: Topology
    layout: Layout
    order: np.ndarray
    """Physical core of every place in the mesh, an int array shaped like it (in the order of AXES)."""
    axes: tuple[AxisPlacement, ...]
    """Placements of the axes larger than 1, outermost first."""
    seconds: float
    """The objective: predicted time on collectives, by the traffic that was assumed."""

    def __repr__(self) -> str:
        lies = ", ".join(f"{axis.axis} on {' '.join(axis.parts)}" for axis in self.axes)
        return f"<Placement: {self.layout} on {self.topology.in_words}: {lies or 'one core'}>"

    @property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """The pieces of the hardware that each axis covers, innermost first."""
        return {axis.axis: axis.pieces for axis in self.axes}

    @property
    def hosts_read_shares(self) -> bool:
        """Tell whether the rows of every host (instance) are one of equal, contiguous shares of the batch."""
        layout, topology = self.layout, self.topology
        hosts = self.order // topology.cores_per_instance
        sizes = [1 if axis in ("context", "tensor") else size for axis, size in layout.sizes.items()]
        shares = np.broadcast_to(np.arange(layout.batch_shards).reshape(sizes), hosts.shape)
        for host in range(topology.instances):
            mine = np.unique(shares[hosts == host])
            if mine[-1] - mine[0] + 1 != len(mine) or layout.batch_shards % len(mine) or mine[0] % len(mine):
                return False
        return True


def default_traffic(layout: Layout) -> dict[str, float]:
    """Estimate the bytes that a core's collectives produce in a step over each axis, where the program does not say.

    Those of Llama 3.1 8B (32 layers, D 4,096, K*h 1,024) in bf16, with 8,192 tokens a core (and so a sequence that
    grows with the context axis):

        tensor    8 activations a layer (gather and scatter around attention and MLP, forward and backward)
        expert    4 activations a layer (to the experts and back, forward and backward)
        context   keys and values of a layer, once forward, twice backward
        fsdp      the parameters twice, their gradients once
        data      gradients of what fsdp, tensor and pipeline leave to a core, in f32
        pipeline  one activation forward, one backward, split over tensor
    """
    layers, width, kv_width, parameters, tokens = 32, 4096, 1024, 8.03e9, 8192
    activation = tokens * width * 2.0
    mine = parameters / (layout.tensor * layout.pipeline)
    return {
        "tensor": 8 * layers * activation / layout.pipeline,
        "expert": 4 * layers * activation / layout.pipeline,
        "context": 3 * layers * tokens * 2 * kv_width * 2.0 / layout.tensor / layout.pipeline,
        "fsdp": 3 * mine * 2.0,
        "data": mine * 4.0 / layout.fsdp,
        "pipeline": 2 * activation / layout.tensor,
    }


def place(topology: Topology, layout: Layout, traffic: Mapping[str, float] | None = None) -> Placement:
    """Find the best legal device order for `layout` on `topology`.

    Args:
        traffic: bytes that a core's collectives produce in a step over each axis (all-gathered size, or size before
            a reduce-scatter); `default_traffic` when left out.

    The objective is the sum over axes of `seconds_per_byte` times these bytes times `EXPOSED`; among equals the order
    nearest to the plain one wins, because how Neuron maps a permuted device assignment is not documented. Raises
    UserError when the layout has another number of devices, or when no order gives every axis legal groups: with the
    axis that cannot have them and the nearest layout that can.
    """
    count = math.prod(layout.sizes.values())
    if count != topology.cores:
        raise UserError(f"{layout} is {count} devices, but {topology.count} x {topology.name} has {topology.cores}")
    traffic = {**default_traffic(layout), **(traffic or {})}
    best: list[Assignment] = []
    least = math.inf  # read by the search as it goes on

    def predicted(assignment: Assignment) -> float:
        return sum(EXPOSED.get(a, 1.0) * traffic[a] * seconds_per_byte(pieces) for a, pieces in assignment.items())

    def promising(part: Assignment) -> bool:
        return predicted(part) <= least * (1 + 1e-9)

    for assignment in _assignments(topology, layout, promising):
        seconds = predicted(assignment)
        if seconds < least * (1 - 1e-9):
            best, least = [assignment], seconds
        elif seconds <= least * (1 + 1e-9):
            best.append(assignment)
    if not best:
        raise UserError(_no_order(topology, layout))
    orders = [_order(topology, layout, assignment) for assignment in best]
    chosen = min(range(len(best)), key=lambda i: int((orders[i].ravel() != range(topology.cores)).sum()))
    return Placement(
        topology=topology,
        layout=layout,
        order=orders[chosen],
        axes=tuple(
            _describe(topology, layout, axis, pieces, orders[chosen])
            for axis, pieces in sorted(best[chosen].items(), key=lambda item: AXES.index(item[0]))
        ),
        seconds=least,
    )


def seconds_per_byte(pieces: tuple[Piece, ...]) -> float:
    """Time to gather one byte in every core over these pieces, level by level from the outermost.

    The sum over levels i, innermost first, of (n_i - 1) / n_i / (n_1 * ... * n_(i-1)) / bandwidth_i: the outer stage
    of a hierarchical collective moves what the inner ones share out (aws-neuron-sdk 2.32.0
    neuron-runtime/explore/internode-collective-comm.rst).
    """
    seconds, inner = 0.0, 1
    for piece in pieces:
        seconds += (piece.size - 1) / piece.size / inner / piece.bandwidth
        inner *= piece.size
    return seconds


def place_mesh(topology: Topology, axes: Sequence[str], cores: np.ndarray) -> MeshPlacement:
    """Find what each axis of a given mesh covers: its devices stand for cores by number, and nothing is searched.

    Args:
        axes: names of the mesh's axes.
        cores: the core of every place in the mesh, shaped like it.

    Raises UserError for an axis whose groups are no rows, or boxes, of cores.
    """
    pieces = {}
    for number, axis in enumerate(axes):
        size = cores.shape[number]
        if size > 1:
            groups = np.unique(np.moveaxis(cores, number, -1).reshape(-1, size), axis=0)
            found = [_covered(topology, axis, group) for group in groups.tolist()]
            pieces[axis] = min(found, key=lambda group: min(piece.bandwidth for piece in group))  # all wait for it
    return MeshPlacement(topology, pieces)


def _covered(topology: Topology, axis: str, group: list[int]) -> tuple[Piece, ...]:
    places = [topology.coordinates(core) for core in group]
    along = {dim.name: sorted({place[dim.name] for place in places}) for dim in topology.dims}
    steps = {name: {b - a for a, b in itertools.pairwise(spots)} for name, spots in along.items()}
    if math.prod(map(len, along.values())) != len(group) or any(len(step) > 1 for step in steps.values()):
        raise UserError(
            f"mesh axis {axis!r}: its devices stand for cores {', '.join(map(str, group[:8]))}"
            f"{', ...' * (len(group) > 8)} of {topology.name}, which are no row or box of cores at even steps, and no "
            "time is known for collectives among such; order the mesh's devices by core"
        )
    pieces = []
    for dim in (dim for dim in reversed(topology.dims) if len(along[dim.name]) > 1):
        size, (step,) = len(along[dim.name]), steps[dim.name]
        name = f"{dim.name}.{size}@{step}"
        whole = size == dim.size
        pieces.append(_part(topology, dim.name) if whole else _apart(topology, dim, name, size, step, step))
    return tuple(pieces)


def _assignments(
    topology: Topology, layout: Layout, promising: Callable[[Assignment], bool] = lambda part: True
) -> Iterator[Assignment]:
    """List every way to give all of the hardware to the axes, each exactly its size; pieces innermost first.

    What `promising` denies of a part is not tried on.
    """
    wanted = {axis: size for axis, size in layout.sizes.items() if size > 1}
    outside = [dim for dim in reversed(topology.dims) if not dim.inside_instance]
    for pieces in _contiguous(topology, wanted) if topology.groups is None else _documented(topology, wanted):
        left = {axis: size // math.prod(p.size for p in pieces.get(axis, ())) for axis, size in wanted.items()}
        yield from _over(topology, outside, left, dict.fromkeys(wanted, ()) | pieces, promising)


def _documented(topology: Topology, wanted: dict[str, int]) -> Iterator[Assignment]:
    """List every way to give an instance to the axes in shapes that documents list."""
    for table in topology.groups or ():
        cover = [tuple(_part(topology, part) for part in parts) for parts in table.cover]
        for axes in itertools.permutations(wanted, len(cover)):
            if all(wanted[a] % math.prod(p.size for p in pieces) == 0 for a, pieces in zip(axes, cover, strict=True)):
                yield dict(zip(axes, cover, strict=True))


def _contiguous(topology: Topology, wanted: dict[str, int]) -> Iterator[Assignment]:
    """List every way to give an instance to the axes one inside the other: groups of the innermost are runs."""
    inside = [dim for dim in reversed(topology.dims) if dim.inside_instance]

    def cut(start: int, size: int) -> tuple[Piece, ...] | None:
        """Cut the pieces of an axis of `size` whose places are `start` cores apart; None where a dim is cut askew."""
        pieces = []
        for dim in inside:
            if start >= dim.size:
                if start % dim.size:
                    return None
                start //= dim.size
            elif size > 1:
                if dim.size % start:
                    return None
                take = min(size, dim.size // start)
                if size % take or (dim.size // start) % take:
                    return None
                pieces.append(_mixed(topology, dim, take, start))
                start, size = 1, size // take
        return tuple(pieces)

    def extend(start: int, so_far: Assignment) -> Iterator[Assignment]:
        if start == topology.cores_per_instance:
            yield so_far
        for axis in wanted:
            for size in range(2, wanted[axis] + 1) if axis not in so_far else ():
                fits = wanted[axis] % size == 0 and topology.cores_per_instance // start % size == 0
                if fits and (pieces := cut(start, size)) is not None:
                    yield from extend(start * size, so_far | {axis: pieces})

    yield from extend(1, {})


def _over(
    topology: Topology,
    dims: list[Dimension],
    left: dict[str, int],
    so_far: Assignment,
    promising: Callable[[Assignment], bool],
) -> Iterator[Assignment]:
    """Extend `so_far` by every division of `dims` (innermost first) among axes of which `left` is left."""
    if not promising(so_far):
        return
    if not dims:
        if all(size == 1 for size in left.values()):
            yield so_far
        return
    dim = dims[0]
    for division in _divisions(dim.size, tuple(left.items())):
        for pieces in _pieces(topology, dim, division):
            rest = {axis: size // division.get(axis, 1) for axis, size in left.items()}
            grown = so_far | {axis: (*so_far[axis], piece) for axis, piece in pieces.items()}
            yield from _over(topology, dims[1:], rest, grown, promising)


@functools.cache
def _divisions(size: int, left: tuple[tuple[str, int], ...]) -> list[dict[str, int]]:
    """List every way to write `size` as a product of one factor an axis, each dividing what is left of the axis."""
    if size == 1:
        return [{}]
    if not left:
        return []
    (axis, most), *others = left
    return [
        {axis: factor, **division} if factor > 1 else division
        for factor in range(1, size + 1)
        if size % factor == 0 and most % factor == 0
        for division in _divisions(size // factor, tuple(others))
    ]


def _pieces(topology: Topology, dim: Dimension, division: dict[str, int]) -> Iterator[dict[str, Piece]]:
    """List the parts of `dim` that a division makes, in every arrangement that its table of parts allows."""
    sizes = list(division.values())
    splits = [split for split in topology.splits[dim.name] if [len(split.order), len(split.order[0])] == sizes]
    if len(division) == 1:
        yield {axis: _part(topology, dim.name) for axis in division}
    elif splits:
        for split, axes in itertools.product(splits, itertools.permutations(division)):
            yield {axis: _part(topology, f"{dim.name}.{part}") for axis, part in zip(axes, split.parts, strict=True)}
    else:  # Mixed radix, the axes with the most communication innermost.
        stride, pieces = 1, {}
        for axis in sorted(division, key=AXES.index, reverse=True):
            pieces[axis] = _mixed(topology, dim, division[axis], stride)
            stride *= division[axis]
        yield pieces


def _part(topology: Topology, name: str) -> Piece:
    """Return the piece that a dim's name, or that of a part in its table, stands for."""
    dim_name, _, part = name.partition(".")
    dim = topology.dim(dim_name)
    if not part:
        return Piece(name, dim_name, dim.size, 1, _rate(topology, dim, 2 if dim.wraps else 1, 1), dim.latency)
    split = topology.split(dim_name, part)
    inner = part == split.parts[1]
    places = split.order[0] if inner else [row[0] for row in split.order]
    return _apart(topology, dim, name, len(places), 0, places[1] - places[0])


def _apart(topology: Topology, dim: Dimension, name: str, size: int, stride: int, step: int) -> Piece:
    """Make the piece of `size` places of a dim, each `step` from the next."""
    hops = max(1, dim.distance(0, step))
    links = 2 if dim.kind == "ring" and 2 * hops == dim.size else 1  # half way around there are two ways to go
    return Piece(name, dim.name, size, stride, _rate(topology, dim, links, hops), dim.latency)


def _mixed(topology: Topology, dim: Dimension, size: int, stride: int) -> Piece:
    """Make the piece of `size` places of a dim that are `stride` apart."""
    if size == dim.size:
        return _part(topology, dim.name)
    hops = stride if dim.kind in ("ring", "line") else 1
    name = f"{dim.name}.{size}" if stride == 1 else f"{dim.name}.{size}@{stride}"
    return Piece(name, dim.name, size, stride, _rate(topology, dim, 1, hops), dim.latency)


def _rate(topology: Topology, dim: Dimension, links: int, hops: int) -> float:
    """Compute the bytes/s for each core when all cores of a chip use its links at once."""
    return dim.bandwidth if dim.kind == "chip" else dim.bandwidth * links / hops / topology.cores_per_chip


def _order(
    topology: Topology, layout: Layout, assignment: Assignment, reflected: tuple[str, ...] = PERMUTED_AXES
) -> np.ndarray:
    """List the physical core of every place in the mesh. Axes of `reflected` go back and forth: neighbours stay so."""
    parts: dict[str, dict[str, tuple[np.ndarray, int]]] = {dim.name: {} for dim in topology.dims}
    for axis, pieces in assignment.items():
        position = np.arange(layout.sizes[axis])
        shape = [1] * len(AXES)
        shape[AXES.index(axis)] = -1
        for piece in pieces:
            position, digit = np.divmod(position, piece.size)
            if axis in reflected and topology.dim(piece.dim).kind != "chip":
                digit = np.where(position % 2, piece.size - 1 - digit, digit)
            parts[piece.dim][piece.name] = digit.reshape(shape), piece.stride
    core = np.zeros([1] * len(AXES), int)
    for dim in topology.dims:
        mine = parts[dim.name]
        cut = {tuple(f"{dim.name}.{part}" for part in split.parts): split for split in topology.splits[dim.name]}
        names = next((names for names in cut if set(mine) == set(names)), None)
        if names is not None:
            place = np.asarray(cut[names].order)[mine[names[0]][0], mine[names[1]][0]]
        else:
            place = sum((digit * stride for digit, stride in mine.values()), np.zeros_like(core))
        core = core * dim.size + place
    return np.broadcast_to(core, tuple(layout.sizes.values()))


def _describe(
    topology: Topology, layout: Layout, axis: str, pieces: tuple[Piece, ...], order: np.ndarray
) -> AxisPlacement:
    along = AXES.index(axis)
    groups = _groups(topology, order, along)
    problem = next((p for p in map(functools.partial(group_problem, topology), groups.tolist()) if p), None)
    walk = _groups(topology, _order(topology, layout, {axis: pieces}, reflected=(axis,)), along)
    chips = {int(core) // topology.cores_per_chip for core in groups[0]}
    return AxisPlacement(
        axis=axis,
        size=layout.sizes[axis],
        parts=tuple(piece.name for piece in pieces),
        pieces=pieces,
        ring=_closed(topology, walk),
        permutes=_closed(topology, groups),
        hops=max(topology.chip_distance(min(chips), chip) for chip in chips),
        bandwidth=min(piece.bandwidth for piece in pieces),
        problem=problem,
        documented=not for_topology(topology).restricts_groups or topology.groups is not None,
    )


def _groups(topology: Topology, order: np.ndarray, along: int) -> np.ndarray:
    """List the physical cores of the groups of one axis that differ by more than the unit they begin in.

    (groups, size of the axis); one unit is like another.
    """
    groups, unit = np.moveaxis(order, along, -1).reshape(-1, order.shape[along]), topology.cores // topology.count
    return np.unique(groups - groups.min(axis=1, keepdims=True) // unit * unit, axis=0)


def _closed(topology: Topology, groups: np.ndarray) -> bool:
    """Tell whether in every group each core is at most one hop from the next, and the last from the first."""
    chips = groups // topology.cores_per_chip
    pairs = {(int(a), int(b)) for row in chips for a, b in zip(row, [*row[1:], row[0]], strict=True)}
    return all(topology.chip_distance(a, b) <= 1 for a, b in pairs)


def _no_order(topology: Topology, layout: Layout) -> str:
    tables = dict.fromkeys(
        " x ".join(str(math.prod(_part(topology, part).size for part in parts)) for parts in table.cover)
        for table in topology.groups or ()
    )
    message = (
        f"{layout} on {topology.count} x {topology.name}: no device order gives every axis groups that Neuron takes. "
        f"Inside an instance its documents list axes of {', '.join(tables)} cores (innermost first)"
    )
    nearest = nearest_legal(topology, layout)
    if nearest is None:
        return message
    changed = {axis: (layout.sizes[axis], size) for axis, size in nearest.sizes.items() if size != layout.sizes[axis]}
    # The axis to blame is the one that the nearest legal layout changes most.
    blamed = max(changed, key=lambda axis: (abs(math.log(changed[axis][0] / changed[axis][1])), AXES.index(axis)))
    settings = " ".join(f"parallel.{axis}={size}" for axis, (_, size) in changed.items())
    return f"{message}; {blamed} = {layout.sizes[blamed]} cannot be legal beside the others. Nearest: {settings}"


def nearest_legal(topology: Topology, layout: Layout) -> Layout | None:
    """Find the layout of the same product, over the same axes and fsdp, with a legal order and the least change."""
    axes = [axis for axis, size in layout.sizes.items() if size > 1 or axis == "fsdp"]

    def change(sizes: dict[str, int]) -> tuple[float, float]:
        steps = [abs(math.log(sizes[axis] / layout.sizes[axis])) for axis in axes]
        return sum(steps), max(steps)

    cores = topology.cores
    every = (dict.fromkeys(axes, 1) | division for division in _divisions(cores, tuple((a, cores) for a in axes)))
    for sizes in sorted(every, key=change):
        candidate = dataclasses.replace(layout, **sizes)
        if next(_assignments(topology, candidate), None) is not None:
            return candidate
    return None
