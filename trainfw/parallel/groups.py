"""Rules on sets of cores: which ones Neuron takes as collective groups, and which permutes.

The shapes are data (`groups` of a topology file, each with its source); the rules here are about sets of physical
cores, whatever mesh or program they come from.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

from trainfw.backends import for_topology
from trainfw.hardware import Dimension, Topology, load_topology


def group_problem(topology: Topology, cores: Sequence[int]) -> str | None:
    """Say why Neuron would refuse a collective group of these physical cores; None when nothing speaks against it.

    A group has the same local cores on every instance (aws-neuron-sdk 2.32.0
    neuron-runtime/explore/internode-collective-comm.rst assumes it), and they have a shape that documents list: one
    core, or a set of `documented_groups`. Where no document lists shapes (Trainium3), only symmetry is asked for.
    """
    if not for_topology(topology).restricts_groups or len(cores) < 2:
        return None
    size = topology.cores_per_instance
    by_instance: dict[int, set[int]] = {}
    for core in cores:
        by_instance.setdefault(core // size, set()).add(core % size)
    (first, local), *others = by_instance.items()
    for instance, theirs in others:
        if theirs != local:
            return (
                f"not the same local cores on every instance: {_ranges(local)} of instance {first}, "
                f"{_ranges(theirs)} of instance {instance}"
            )
    documented = documented_groups(topology.name, topology.lnc)
    if len(local) == 1 or topology.groups is None or frozenset(local) in documented:
        return None
    n, low = len(local), min(local)
    contiguous = max(local) - low + 1 == n
    sizes = sorted({len(group) for group in documented})
    where = f"{_ranges(local)} of an instance"
    if n not in sizes:
        return f"{n} cores ({where}): the sizes that documents list are {', '.join(map(str, sizes))}"
    if contiguous and low % n:
        return f"not aligned: {where}, whose first is not a multiple of {n}"
    listed = _ranges(min(sorted(group) for group in documented if len(group) == n and low in group))
    return f"{'' if contiguous else 'not contiguous: '}{where}; of {n} cores with core {low} documents list {listed}"


def permute_problem(topology: Topology, pairs: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
    """Say why Neuron would refuse a permute with these (source, target) physical cores: (rule, reason), or None.

    The pairs must form rings (`circular`) over directly connected ranks (`neighbours`): aws-neuron-sdk 2.32.0
    neuron-runtime/about/collectives.rst. Two cores are taken as directly connected when they are on one chip, on
    chips that share a link or switch, or on the same chip of two units on the network.
    """
    if not for_topology(topology).restricts_groups or not pairs:
        return None
    to = dict(pairs)
    if len(to) < len(pairs) or set(to) != set(to.values()):
        ends = sorted(set(to.values()) ^ set(to))
        return "circular", f"not a ring: {_ranges(ends)} only send or only receive" if ends else "a core sends twice"
    lengths = {len(cycle) for cycle in _cycles(to)}
    if lengths == {1}:
        return "circular", "no ring: each core sends to itself"
    if len(lengths) > 1:
        return "circular", f"rings of different lengths: {', '.join(map(str, sorted(lengths)))}"
    for source, target in pairs:
        hops = topology.chip_distance(source // topology.cores_per_chip, target // topology.cores_per_chip)
        if hops > 1:
            return "neighbours", f"core {source} sends to core {target}, which is {hops} hops away"
    return None


@functools.cache
def documented_groups(name: str, lnc: int) -> frozenset[frozenset[int]]:
    """List every set of local cores of a topology's instance that has a documented shape."""
    topology = load_topology(name, lnc=lnc)
    return frozenset(
        group for table in topology.groups or () for parts in table.cover for group in _shape(topology, parts)
    )


def _shape(topology: Topology, parts: Iterable[str]) -> Iterator[frozenset[int]]:
    """List every set of local cores that varies over these dims (or parts of dims) alone."""
    inside = [dim for dim in topology.dims if dim.inside_instance]
    ways = [_places(topology, dim, [p for p in parts if p.partition(".")[0] == dim.name]) for dim in inside]
    for choice in itertools.product(*ways):
        cores = [0]
        for dim, places in zip(inside, choice, strict=True):
            cores = [core * dim.size + place for core in cores for place in places]
        yield frozenset(cores)


def _places(topology: Topology, dim: Dimension, parts: list[str]) -> list[list[int]]:
    """List the sets of places along a dim that vary over `parts` of it."""
    if not parts:
        return [[place] for place in range(dim.size)]
    if parts == [dim.name] or len(parts) == 2:
        return [list(range(dim.size))]
    part = parts[0].partition(".")[2]
    split = topology.split(dim.name, part)
    return split.order if part == split.parts[1] else [list(column) for column in zip(*split.order, strict=True)]


def _cycles(to: dict[int, int]) -> Iterator[list[int]]:
    left = set(to)
    while left:
        at = min(left)
        cycle = []
        while at in left:
            left.remove(at)
            cycle.append(at)
            at = to[at]
        yield cycle


def _ranges(cores: Iterable[int]) -> str:
    """Write cores as `cores 0-15, 48-63`, shortened where it is long."""
    shown = runs(cores)
    several = len(shown) > 1 or "-" in shown[0]
    if len(shown) > 6:
        shown = [*shown[:4], "...", shown[-1]]
    return f"core{'s' * several} {', '.join(shown)}"


def runs(numbers: Iterable[int]) -> list[str]:
    """Write each run of numbers that follow each other: `0-3`, `7`."""
    ordered = enumerate(sorted(set(numbers)))
    found = [[number for _, number in run] for _, run in itertools.groupby(ordered, lambda pair: pair[1] - pair[0])]
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found]
