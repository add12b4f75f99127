"""The time of a collective on the links that a placement gives it.

A collective along axes that cover several physical dims runs level by level, as hierarchical collectives do
(aws-neuron-sdk 2.32.0 neuron-runtime/explore/internode-collective-comm.rst: a reduce-scatter goes from the inside
out, an all-gather back in). With n_i places at level i, innermost first, and N bytes in the whole buffer, one core
moves at level i

    all-gather, reduce-scatter    N * (n_i - 1) / n_i / (n_1 * ... * n_(i-1))
    all-reduce                    twice that, a reduce-scatter and an all-gather
    all-to-all                    N * (n_i - 1) / n_i, for nothing is shared out on the way
    collective-permute            N, over the slowest of its links

(jax-ml.github.io/scaling-book/sharding; for one level these are its formulas.) Its rate there is `Piece.bandwidth`:
a ring is gone around both ways, so that its two links count; a line, or part of a ring, has one; what is not adjacent
divides its links by the hops between; all cores of a chip share the links of the chip; a switch or network gives each
chip its port; cores of one chip share its inner bandwidth. Where the hardware's file says what share of it large
collectives reach (`efficiency`), that share. An all-to-all passes through places in between, which multiplies its time
(see `_detour`).

Latency is hops times the latency of one, by the algorithm that is chosen for the size (see `_algorithm`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainfw import backends
from trainfw.hardware import Topology, duration
from trainfw.parallel import MeshPlacement, Piece, Placement
from trainfw.planning.read_step.analysis import Transfer
from trainfw.tables import table

_MOST_LISTED = 12

MESH_BYTES = 1e6
"""Below, Neuron's collectives inside an instance go straight to every peer ("Mesh < 1 MB").

aws-neuron-sdk 2.32.0 neuron-runtime/explore/intranode-collective-comm.rst, as are the next figure and the hops."""
RDH_BYTES = 56e6
"""Below, they double and halve recursively ("1-56 MB"); above, they go around rings ("> 56 MB")."""


@dataclass(frozen=True)
class Level:
    """A collective in one physical dim."""

    dim: str
    part: str
    """The dim, or the part of it that the axis covers."""
    bytes: float
    """Bytes that one core moves, each time."""
    seconds: float
    """At the rate of the links, each time."""


@dataclass(frozen=True)
class TransferTime:
    """Time of one run of a collective."""

    seconds: float
    latency: float
    """Part of the seconds that does not depend on the bytes."""
    levels: tuple[Level, ...]
    """Innermost first."""
    algorithm: str
    """Algorithm of each stage: inside an instance, then between instances."""


def transfer_seconds(
    transfer: Transfer, placement: Placement | MeshPlacement, speed: Mapping[str, float] | None = None
) -> TransferTime:
    """The time of one run of `transfer` on the links of `placement`, whose `speed` by dim multiplies their figures."""
    topology = placement.topology
    order = [dim.name for dim in reversed(topology.dims)]
    pieces = [piece for axis, covered in placement.pieces.items() if axis in transfer.axes for piece in covered]
    pieces.sort(key=lambda piece: (order.index(piece.dim), piece.stride))  # innermost first
    size = float(transfer.bytes)
    levels = []
    inner = 1
    moved: float
    for piece in pieces:
        across = size * (piece.size - 1) / piece.size
        detour = 1.0
        match transfer.kind:
            case "all-gather" | "reduce-scatter":
                moved = across / inner
            case "all-reduce":
                moved = 2 * across / inner
            case "all-to-all" | "ragged-all-to-all":
                moved, detour = across, _detour(piece, topology)
            case _:  # a permute goes one way
                dim = topology.dim(piece.dim)
                moved, detour = size, 2.0 if dim.wraps and piece.size == dim.size else 1.0
        share = topology.figures.get(f"{topology.dim(piece.dim).link}.efficiency")
        rate = (speed or {}).get(piece.dim, 1.0) * (1.0 if share is None else share.number)
        levels.append(Level(piece.dim, piece.name, moved, moved * detour / piece.bandwidth / rate))
        inner *= piece.size
    if transfer.kind in ("collective-permute", "collective-broadcast"):
        levels = [max(levels, key=lambda level: level.seconds)] if levels else []
    # A stage inside the instance and one outside it, twice for an all-reduce.
    latency, algorithms, rounds = 0.0, [], 2 if transfer.kind == "all-reduce" else 1
    for inside in (True, False):
        if stage := [piece for piece in pieces if topology.dim(piece.dim).inside_instance == inside]:
            name, hops = _algorithm(transfer.kind, size, stage, topology, inside=inside)
            latency += rounds * hops * max(piece.latency for piece in stage)
            algorithms.append(name)
    seconds = sum(level.seconds for level in levels) + latency
    return TransferTime(seconds, latency, tuple(levels), " + ".join(algorithms))


def link_utilisation(
    transfers: Iterable[Transfer], placement: Placement | MeshPlacement, step_seconds: float
) -> dict[str, float]:
    """The share of a step for which the links along each physical dim (outermost first) carry data."""
    busy: defaultdict[str, float] = defaultdict(float)
    for transfer in transfers:
        for level in transfer_seconds(transfer, placement).levels:
            busy[level.dim] += level.seconds * transfer.times
    return {dim.name: busy[dim.name] / step_seconds for dim in placement.topology.dims if dim.size > 1}


def _detour(piece: Piece, topology: Topology) -> float:
    """Return how many times longer an all-to-all takes than its own bytes would, for those that cores pass on.

    With chunks of N / n: on a ring of n, gone around both ways, each direction of a link carries floor(n^2 / 4) / 2
    chunks (the scaling book's "bytes / 4" of the array over all); on a line, the middle link carries floor(n / 2) *
    ceil(n / 2). One direction of a ring's link is half of its rate.
    """
    n, kind = piece.size, topology.dim(piece.dim).kind
    if kind not in ("ring", "line"):
        return 1.0
    crossing = (n // 2) * ((n + 1) // 2)  # pairs of places, across the middle
    return crossing / (n - 1)


def _algorithm(kind: str, size: float, pieces: list[Piece], topology: Topology, *, inside: bool) -> tuple[str, int]:
    """(name, hops one after the other) among the places of one stage.

    Inside an instance on Neuron: Mesh takes one hop, and one more in the chip; RDH log2 of the chips, and one more in
    the chip; KangaRing, where all cores of a chip take part, half a hop for each, else Ring one. Between instances
    documents give no sizes at which Neuron changes from one to the other: recursive doubling is assumed, log2 hops,
    as is NCCL's tree elsewhere.
    """
    ranks = math.prod(piece.size for piece in pieces)
    if kind in ("collective-permute", "collective-broadcast"):
        return "permute", 1
    backend = backends.for_topology(topology)
    if not inside or not backend.chooses_algorithms:
        return backend.tree_algorithm, math.ceil(math.log2(ranks))
    in_chip = math.prod(piece.size for piece in pieces if topology.dim(piece.dim).kind == "chip")
    chips = ranks // in_chip
    if chips == 1:
        return "in chip", 1
    if size < MESH_BYTES:
        return "Mesh", 1 + (in_chip > 1)
    if size < RDH_BYTES:
        return "RDH", math.ceil(math.log2(chips)) + (in_chip > 1)
    if in_chip == topology.cores_per_chip > 1:
        return "KangaRing", ranks // 2
    return "Ring", ranks - 1


def transfers_json(
    transfers: Sequence[tuple[Transfer, TransferTime]], *, phases: bool = False
) -> list[dict[str, object]]:
    """Give collectives as plain data, with the phase of a step that each is in."""
    return [
        {
            **({"phase": transfer.phase} if phases else {}),
            "kind": transfer.kind,
            "axes": list(transfer.axes),
            "dtype": transfer.dtype,
            "bytes": transfer.bytes,
            "times": transfer.times,
            "seconds": taken.seconds,
        }
        for transfer, taken in transfers
    ]


def transfer_lines(transfers: Sequence[tuple[Transfer, TransferTime]], *, phases: bool = False) -> Iterator[str]:
    """Lay out the first collectives as a table, with the phase of a step that each is in, and say how many are left."""
    heads = ("collective", "in", "over", "dtype", "MB", "times", "a step" if phases else "in all", "algorithm")
    rows = [heads]
    for transfer, taken in transfers[:_MOST_LISTED]:
        size, times = f"{transfer.bytes / 1e6:,.1f}", f"{transfer.times:,}"
        what = (transfer.kind, transfer.phase, ", ".join(transfer.axes), transfer.dtype)
        rows.append((*what, size, times, duration(taken.seconds * transfer.times), taken.algorithm))
    shown = rows if phases else [(row[0], *row[2:]) for row in rows]
    yield from (f"  {line}" for line in table(shown, "<<<<>>><" if phases else "<<<>>><"))
    if len(transfers) > _MOST_LISTED:
        yield f"  and {len(transfers) - _MOST_LISTED} more that take less"
