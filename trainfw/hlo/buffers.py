"""Places and lifetimes of a compiled module's values, from what XLA dumps of its buffer assignment."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from trainfw.hlo.module import Shape

_ALLOCATION = re.compile(r"allocation \d+: size \d+, (.*):")
_VALUE = re.compile(
    r" value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})? (?:\(phi\) )?@\d+> "
    r"\(size=(\d+),offset=(\d+)\): (?:([a-z]\w*)\[([\d,]*)\])?"
)
_RANGE = re.compile(r"^    ([\w.\-]+)\{([\d,]*)\}:(\d+)-(\d+)$")
_INSTRUCTION = re.compile(r"^    (\d+):([\w.\-]+)$")


@dataclass(frozen=True)
class Buffer:
    """A value in the memory that a program takes beside its arguments and results."""

    name: str
    """Name of the instruction (of the final module) that makes it."""
    index: tuple[int, ...]
    """Index in that instruction's tuple."""
    shape: Shape | None
    """Shape; None for a tuple of pointers."""
    bytes: int
    offset: int
    start: int
    """Place in the schedule from which on it is held, loops' bodies written out once."""
    end: int
    """The last place at which it is."""
    until: int
    """The last place at which its bytes are held, under its own name or those of the loops that they are handed to."""


@dataclass(frozen=True)
class Assignment:
    """The temporaries of a compiled module."""

    buffers: tuple[Buffer, ...]
    schedule: tuple[str, ...]
    """Names of instructions in the order in which they run, loops' bodies written out once."""


def parse_assignment(assignment: str, live_ranges: str) -> Assignment:
    """Read what XLA dumps as `*buffer-assignment.txt` and `*live-range.txt`."""
    ranges: dict[tuple[str, str], tuple[int, int]] = {}
    schedule: list[str] = []
    for line in live_ranges.splitlines():
        if match := _RANGE.match(line):
            ranges[match[1], match[2]] = int(match[3]), int(match[4])
        elif match := _INSTRUCTION.match(line):
            schedule.append(match[2])
        elif line.startswith("  Live ranges"):
            break
    temporary = False
    buffers: list[Buffer] = []
    for line in assignment.splitlines():
        if match := _ALLOCATION.match(line):
            temporary = "preallocated-temp" in match[1]
        elif temporary and (match := _VALUE.match(line)):
            name, index = match[1], match[2] or ""
            dims = tuple(int(dim) for dim in (match[6] or "").split(",") if dim)
            shape = Shape(match[5], dims) if match[5] else None
            place = tuple(int(i) for i in index.split(",") if i)
            if (name, index) in ranges:
                start, end = ranges[name, index]
                buffers.append(Buffer(name, place, shape, int(match[3]), int(match[4]), start, end, end))
    return Assignment(tuple(_handed_on(buffers)), tuple(schedule))


def _handed_on(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    """Join values that are one buffer under several names (a loop's input, carry and result), each up to the next.

    XLA has the one end where the next starts.
    """
    places: dict[tuple[int, int], list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        places[buffer.offset, buffer.bytes].append(buffer)
    for same in places.values():
        following = None
        for buffer in sorted(same, key=lambda buffer: (buffer.start, buffer.end), reverse=True):
            if following is not None and buffer.end == following.start:
                buffer = replace(buffer, end=buffer.end - 1, until=following.until)
            yield buffer
            following = buffer
