"""The collectives of a module: what kind, how many bytes, among whom, how often."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainfw.hlo.groups import Groups, parse_groups, parse_pairs
from trainfw.hlo.module import Instruction, Module

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective instruction. Devices are numbered as partitions: by place in `mesh.devices.flat`."""

    kind: str
    dtype: str
    """As HLO names it: `bf16`, `f32`, ..."""
    bytes: int
    """Of the whole buffer on one device, each time: what an all-gather returns, what a reduce-scatter takes."""
    times: int
    """How often it runs in one run of the module."""
    groups: Groups
    """Who takes part together; empty for a permute."""
    pairs: tuple[tuple[int, int], ...]
    """(source, target) of a permute."""
    instruction: Instruction

    @property
    def group_size(self) -> int:
        """Devices of a group; of a permute, the longest chain or ring of transfers."""
        return max((len(group) for group in self.groups), default=0) or _longest_chain(self.pairs)

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.times

    def axes(self, mesh: Any) -> tuple[str, ...] | None:
        """The mesh axes it runs along; None when it is not along whole axes."""
        if not self.pairs:
            return axes_of(mesh, self.groups)
        sizes = _sizes(mesh)
        places = [(_place(a, sizes), _place(b, sizes)) for a, b in self.pairs]
        return tuple(axis for axis in sizes if any(a[axis] != b[axis] for a, b in places))


def collectives_of(module: Module) -> list[Collective]:
    """Every collective of the module, those among single devices left out."""
    found = []
    for instruction, times in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups: Groups = ()
        pairs: tuple[tuple[int, int], ...] = ()
        if kind == "collective-permute":
            pairs = parse_pairs(instruction.attributes["source_target_pairs"])
        else:
            groups = parse_groups(instruction.attributes.get("replica_groups", "{}"), module.num_partitions)
        if pairs or any(len(group) > 1 for group in groups):
            size = _bytes(kind, instruction, max(map(len, groups), default=1))
            dtype = max(instruction.shapes, key=lambda shape: shape.bytes).dtype
            found.append(Collective(kind, dtype, size, times, groups, pairs, instruction))
    return found


def axes_of(mesh: Any, groups: Sequence[Sequence[int]]) -> tuple[str, ...] | None:
    """Which axes of a mesh the groups span, in the mesh's order; None when they are not all lines along whole axes.

    Args:
        mesh: a jax Mesh, or its axis names and sizes, outermost first.
        groups: of device places in the flattened mesh; the order inside a group, and of groups, does not matter.
    """
    sizes = _sizes(mesh)
    first = [_place(device, sizes) for device in groups[0]]
    axes = tuple(axis for axis in sizes if len({place[axis] for place in first}) > 1)
    return axes if {frozenset(group) for group in groups} == _lines(tuple(sizes.items()), axes) else None


@functools.lru_cache(maxsize=256)
def _lines(sizes: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> frozenset[frozenset[int]]:
    """Every group of devices that differ along `axes` alone."""
    lines: dict[tuple[int, ...], list[int]] = {}
    for device in range(math.prod(size for _, size in sizes)):
        place = _place(device, dict(sizes))
        lines.setdefault(tuple(at for axis, at in place.items() if axis not in axes), []).append(device)
    return frozenset(map(frozenset, lines.values()))


def _sizes(mesh: Any) -> dict[str, int]:
    return dict(mesh if isinstance(mesh, Mapping) else mesh.shape)


def _place(device: int, sizes: dict[str, int]) -> dict[str, int]:
    place: dict[str, int] = {}
    for axis in reversed(sizes):
        device, place[axis] = divmod(device, sizes[axis])
    return place


def _bytes(kind: str, instruction: Instruction, group_size: int) -> int:
    started = instruction.opcode.endswith("-start")
    # The start of an asynchronous collective returns its operand beside its result.
    result = max(s.bytes for s in instruction.shapes) if started else instruction.bytes
    return result * group_size if kind == "reduce-scatter" else result


def _longest_chain(pairs: Iterable[tuple[int, int]]) -> int:
    to = dict(pairs)
    longest = 0
    for start in to:
        at, length = start, 1
        while at in to and length <= len(to):
            at = to[at]
            if at == start:
                break
            length += 1
        longest = max(longest, length)
    return longest
