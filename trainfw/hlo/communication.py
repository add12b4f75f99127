"""The collectives of a module: what kind, how many bytes, among whom, how often."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainfw.hlo.groups import Groups, parse_groups, parse_pairs
from trainfw.hlo.module import Computation, Instruction, Module

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SAME_ELEMENTS = {"bitcast", "convert", "copy", "reshape", "transpose"}


@dataclass(frozen=True)
class Collective:
    """One collective instruction. Devices are numbered as partitions: by place in `mesh.devices.flat`."""

    kind: str
    dtype: str
    """Dtype as HLO names it: `bf16`, `f32`, ..."""
    bytes: int
    """Bytes of the whole buffer on one device, each time: what an all-gather returns, what a reduce-scatter takes."""
    times: int
    groups: Groups
    """Devices that take part together; empty for a permute."""
    pairs: tuple[tuple[int, int], ...]
    """(source, target) of a permute."""
    instruction: Instruction
    scattered: bool = False
    """An all-reduce of which every device keeps its own part only: compilers with a reduce-scatter use that."""

    @property
    def group_size(self) -> int:
        """Count the devices of a group; of a permute, the longest chain or ring of transfers."""
        return max((len(group) for group in self.groups), default=0) or _longest_chain(self.pairs)

    def axes(self, mesh: Any) -> tuple[str, ...] | None:
        """Return the mesh axes it runs along; None when it is not along whole axes."""
        return self.spanned(mesh) if self.pairs else axes_of(mesh.shape, self.groups)

    def spanned(self, mesh: Any) -> tuple[str, ...]:
        """Return the mesh axes along which members of a group differ, wholly or in part."""
        return _spanned(mesh.shape, self.groups or self.pairs)


def collectives_of(module: Module) -> list[Collective]:
    """List every collective of the module, those among single devices left out."""
    return [
        collective
        for name, times in module.times.items()
        for instruction in module.computations[name].instructions.values()
        if (collective := _collective(instruction, times, module.computations[name], module.num_partitions)) is not None
    ]


def _collective(
    instruction: Instruction, times: int, computation: Computation, num_partitions: int
) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups: Groups = ()
    pairs: tuple[tuple[int, int], ...] = ()
    if kind == "collective-permute":
        pairs = parse_pairs(instruction.attributes["source_target_pairs"])
    else:
        groups = parse_groups(instruction.attributes.get("replica_groups", "{}"), num_partitions)
    group_size = max(map(len, groups), default=1)
    if not pairs and group_size < 2:
        return None
    largest = max(instruction.shapes, key=lambda shape: shape.bytes)
    # What is started returns its operand beside its result.
    size = largest.bytes if instruction.opcode.endswith("-start") else instruction.bytes
    return Collective(
        kind=kind,
        dtype=largest.dtype,
        bytes=size * group_size if kind == "reduce-scatter" else size,
        times=times,
        groups=groups,
        pairs=pairs,
        instruction=instruction,
        scattered=kind == "all-reduce" and _is_scattered(instruction, computation, group_size),
    )


def _is_scattered(instruction: Instruction, computation: Computation, parts: int) -> bool:
    """Tell whether an array is only used by cutting one part out of it, somewhere else on every device."""
    elements = math.prod(instruction.shapes[0].dims)
    while True:
        users = computation.users.get(instruction.name, ())
        if not users or instruction.is_root:
            return False
        if all(user.opcode == "dynamic-slice" for user in users):
            return all(
                math.prod(user.shapes[0].dims) * parts == elements and _by_partition(user, computation)
                for user in users
            )
        if len(users) > 1 or users[0].opcode not in _SAME_ELEMENTS:
            return False
        instruction = users[0]


def _by_partition(slice_: Instruction, computation: Computation) -> bool:
    """Tell whether a slice starts at a place that depends on the device."""
    left = [operand.partition("#")[0] for operand in slice_.operands[1:]]
    seen: set[str] = set()
    while left:
        name = left.pop()
        instruction = computation.instructions[name]
        if instruction.opcode == "partition-id":
            return True
        if name not in seen:
            seen.add(name)
            left += [operand.partition("#")[0] for operand in instruction.operands]
    return False


def axes_of(sizes: Mapping[str, int], groups: Sequence[Sequence[int]]) -> tuple[str, ...] | None:
    """List the axes of a mesh that the groups span, in its order; None when not all groups are lines along whole axes.

    Devices are numbered by place in the flattened mesh; the order inside a group, and of groups, does not matter.
    """
    axes = _spanned(sizes, groups[:1])
    return axes if {frozenset(group) for group in groups} == _lines(tuple(sizes.items()), axes) else None


@functools.lru_cache(maxsize=256)
def _lines(sizes: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> frozenset[frozenset[int]]:
    """List every group of devices that differ along `axes` alone."""
    shape, along = [size for _, size in sizes], [number for number, (axis, _) in enumerate(sizes) if axis in axes]
    devices = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), along, range(-len(along), 0))
    return frozenset(map(frozenset, devices.reshape(-1, math.prod(shape[number] for number in along)).tolist()))


def _spanned(sizes: Mapping[str, int], groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """List the axes along which members of a group differ."""
    shape = tuple(sizes.values())
    places = [np.unravel_index(group, shape) for group in groups]
    return tuple(axis for i, axis in enumerate(sizes) if any(np.ptp(place[i]) for place in places))


def _longest_chain(pairs: Iterable[tuple[int, int]]) -> int:
    to = dict(pairs)

    def length(start: int) -> int:
        seen, at = {start}, start
        while (at := to.get(at, start)) not in seen:
            seen.add(at)
        return len(seen)

    return max(map(length, to), default=0)
