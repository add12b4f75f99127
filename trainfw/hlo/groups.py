"""Replica groups as HLO prints them: lists, reshaped iotas, and axes of a mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_TRANSPOSED = re.compile(r"(?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,?\s*device_ids=\((.*)\))?\s*\{([^}]*)\}")
_AXIS = re.compile(r"['\"]?([\w.\-]+)['\"]?=(\d+)")
_AXIS_REFERENCE = re.compile(r"['\"]?([\w.\-]+)['\"]?(?::\((\d+)\)(\d+))?")


def parse_groups(text: str, num_partitions: int) -> Groups:
    """Return the groups of devices that `replica_groups=<text>` names; `{}` is all of them in one.

    The forms: `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, groups of an iota of the second shape, transposed and
    reshaped; `mesh['a'=2,'b'=4] {'b'}`, the devices along axes of a mesh, where `'b':(2)2` is a part of an axis
    (the part of size 2 after one of size 2).
    """
    text = text.strip()
    if text.startswith("mesh["):
        return _along_axes(text)
    if text.startswith("["):
        if (match := _IOTA.match(text)) is None:
            raise ValueError(f"replica groups {text!r}: no form of HLO that is known")
        dims, shape, order = (_numbers(part or "") for part in match.groups())
        devices = range(math.prod(shape))
        return _cut(devices, shape, order, dims[-1] if len(dims) > 1 else len(devices))
    groups = [_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", text[1:-1])]
    return tuple(groups) or (tuple(range(num_partitions)),)


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Return the (source, target) pairs of `source_target_pairs={{0,1},{1,0}}`."""
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),\s*(\d+)\}", text))


def _along_axes(text: str) -> Groups:
    match = _MESH.match(text)
    if match is None:
        raise ValueError(f"replica groups {text!r}: no form of HLO that is known")
    sizes = {name: int(size) for name, size in _AXIS.findall(match[1])}
    devices = _devices(match[2].strip(), math.prod(sizes.values())) if match[2] else range(math.prod(sizes.values()))
    # (axis, pre-size, size): a reference to part of an axis cuts it into (pre-size, size, rest).
    wanted = [
        (name, int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS_REFERENCE.findall(match[3])
    ]
    shape: list[int] = []
    chosen: dict[tuple[str, int], int] = {}
    for name, whole in sizes.items():
        done = 1
        for _, before, size in sorted(part for part in wanted if part[0] == name):
            shape += [before // done, size]
            chosen[name, before] = len(shape) - 1
            done = before * size
        shape.append(whole // done)
    inner = [chosen[name, before] for name, before, _ in wanted]
    outer = [dim for dim in range(len(shape)) if dim not in inner]
    return _cut(devices, shape, outer + inner, math.prod(shape[dim] for dim in inner))


def _devices(text: str, count: int) -> Sequence[int]:
    """Return the devices of a mesh in its order: `[16,4]T(1,0)`, an iota transposed, or a list of them."""
    match = _TRANSPOSED.match(text)
    if match is not None and (match[2] or "<=" in text):
        return _cut(range(count), _numbers(match[1]), _numbers(match[2] or ""), count)[0]
    return _numbers(text.strip("[]{}"))


def _cut(devices: Sequence[int], shape: Sequence[int], order: Sequence[int], size: int) -> Groups:
    """Cut devices that stand in an array of `shape` into groups of `size`, the array transposed to `order` before."""
    rows = np.asarray(devices).reshape(shape).transpose(order or None).reshape(-1, size)
    return tuple(map(tuple, rows.tolist()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
