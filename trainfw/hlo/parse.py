"""HLO text -> Module."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from trainfw.hlo.module import Computation, Instruction, Module, Place, Shape, user_place

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_LAYOUT = re.compile(r"\{[^}]*\}")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+(?:#\d+)?)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_Places: TypeAlias = Callable[[int], Place | None]
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse_module(text: str) -> Module:
    """Read what XLA dumps (`*.txt`), with its tables of stack frames."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.startswith("HloModule"))
    partitions = re.search(r"num_partitions=(\d+)", header)
    tables: dict[str, dict[int, str]] = {table: {} for table in _TABLES}
    computations: dict[str, Computation] = {}
    entry = ""
    table = None
    places: _Places | None = None
    for line in lines:
        if line in _TABLES:
            table = tables[line]
        elif table is not None and line[:1].isdigit():
            number, _, value = line.partition(" ")
            table[int(number)] = value
        elif match := _HEADER.match(line):
            table = None
            places = places or _places(tables)
            own = itertools.takewhile(lambda line: not line.startswith("}"), lines)
            found = [_instruction(_COMMENT.sub("", line), places) for line in own]
            computations[match[2]] = Computation(match[2], {one.name: one for one in found if one is not None})
            if match[1]:
                entry = match[2]
    return Module(int(partitions[1]) if partitions else 1, entry, computations)


def _places(tables: dict[str, dict[int, str]]) -> _Places:
    """Stack frame number -> the place in user code."""
    frames = {number: _numbers(value) for number, value in tables["StackFrames"].items()}
    locations = {number: _numbers(value) for number, value in tables["FileLocations"].items()}
    files = {number: value.strip('"') for number, value in tables["FileNames"].items()}
    # XLA has printed parents one too high, so that the outermost frame is its own parent.
    offset = 1 if frames.get(1, {}).get("parent_frame_id") == 1 else 0

    def chain(frame: int) -> Iterator[Place]:
        while frame in frames:
            location = locations[frames[frame]["file_location_id"]]
            yield Place(files[location["file_name_id"]], location["line"])
            parent = frames[frame].get("parent_frame_id", 0) - offset
            frame = parent if parent != frame else 0

    return functools.cache(lambda frame: user_place(chain(frame)))


def _numbers(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}


def _instruction(line: str, places: _Places) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    shape_end = _closing(line, match.end()) if line[match.end()] == "(" else line.index(" ", match.end())
    shapes = tuple(
        Shape(dtype, tuple(int(dim.strip("<=?")) for dim in dims.split(",") if dim.strip("<=? ")))
        for dtype, dims in _ARRAY.findall(_LAYOUT.sub("", line[match.end() : shape_end]))
    )
    opening = line.index("(", shape_end)
    end = _closing(line, opening)
    opcode, inside = line[shape_end:opening].strip(), line[opening + 1 : end - 1]
    attributes = dict(_attributes(line[end:]))
    metadata = attributes.pop("metadata", "")
    op_name, frame = (pattern.search(metadata) for pattern in (_OP_NAME, _FRAME))
    return Instruction(
        name=match[2],
        opcode=opcode,
        shapes=shapes,
        operands=tuple(_OPERAND.findall(inside)),
        literal=inside if opcode in ("constant", "parameter") else None,
        attributes=attributes,
        op_name=op_name[1] if op_name else "",
        place=places(int(frame[1])) if frame else None,
        is_root=bool(match[1]),
    )


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    """Split `, a=b, c={d, e=f}` into (a, b), (c, {d, e=f})."""
    text = re.sub(r",\s*device_ids=", " device_ids=", text)  # of the mesh whose axes are named after them
    ends = [i for i, c, depth in _unquoted(text, 0) if c == "," and depth == 0]
    for start, end in itertools.pairwise([-1, *ends, len(text)]):
        key, equals, value = text[start + 1 : end].strip().partition("=")
        if equals:
            yield key, value


def _unquoted(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """Yield (index, character, brackets open after it) from `start` on, where what stands in quotes is quotes alone."""
    depth = 0
    for i, c in enumerate(_QUOTED.sub(lambda quoted: '"' * len(quoted[0]), text[start:]), start):
        depth += (c in "([{") - (c in ")]}")
        yield i, c, depth


def _closing(text: str, opening: int) -> int:
    """Return the index after the bracket that closes the one at `opening`."""
    for i, c, depth in _unquoted(text, opening):
        if depth == 0 and c in ")]}":
            return i + 1
    raise ValueError(f"HLO: no closing bracket in {text[opening : opening + 80]!r}")
