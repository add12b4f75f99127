"""An HLO module as data."""

from __future__ import annotations

import functools
import math
import operator
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

LIBRARIES = frozenset({"jax", "jaxlib", "flax", "optax", "chex", "orbax", "einops", "numpy"})
"""Packages whose frames are never where somebody made a mistake in their own program."""


@dataclass(frozen=True, order=True)
class Place:
    """A line of Python."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@functools.cache
def is_library(file: str) -> bool:
    """Tell whether a file belongs to Python itself or to one of LIBRARIES."""
    parts = file.split(os.sep)
    for installed in ("site-packages", "dist-packages"):
        if installed in parts:
            return parts[parts.index(installed) + 1] in LIBRARIES
    return file.startswith((sysconfig.get_path("stdlib") + os.sep, "<frozen"))


def user_place(frames: Iterable[Place]) -> Place | None:
    """Choose the innermost of `frames` (given innermost first) in user code, else the innermost; None of none."""
    frames = list(frames)
    return next((frame for frame in frames if not is_library(frame.file)), frames[0] if frames else None)


_FOLDED: dict[str, Callable[..., int]] = {
    "convert": int,
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "clamp": lambda low, value, high: min(max(low, value), high),
}
"""Arithmetic of integer scalars."""
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
"""Bits of an element, of dtypes whose first number does not say it."""


@dataclass(frozen=True)
class Shape:
    """An array's dtype (as HLO names it: `bf16`, `s32`, `f8e4m3fn`, ...) and dims."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Shapes of the result; a tuple's arrays in order."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation; `name#i` is element i of a tuple."""
    literal: str | None
    """Text in the parentheses of a constant or a parameter."""
    attributes: Mapping[str, str]
    op_name: str
    """JAX's path to the operation, such as `jit(train_step)/transpose(jvp())/while/body/dot_general`."""
    place: Place | None
    is_root: bool = False

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Return the instructions that take each instruction's result."""
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(operand.partition("#")[0] for operand in instruction.operands):
                users[operand].append(instruction)
        return {name: tuple(found) for name, found in users.items()}

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """List the shapes of an instruction's operands, which may be elements of a loop's result (`while.9#2`)."""
        named = (operand.partition("#") for operand in instruction.operands)
        return [self.instructions[name].shapes[int(element or 0)] for name, _, element in named]

    def source(self, operand: str) -> Instruction | None:
        """Return the instruction behind an operand, through copies and elements of tuples that are made there."""
        name, _, element = operand.partition("#")
        instruction = self.instructions.get(name)
        while instruction is not None:
            if instruction.opcode in ("copy", "bitcast"):
                instruction = self.instructions.get(instruction.operands[0])
            elif instruction.opcode == "tuple" and element.isdigit():
                return self.source(instruction.operands[int(element)])
            elif instruction.opcode == "get-tuple-element" and (index := instruction.attributes.get("index")):
                made = self.source(f"{instruction.operands[0]}#{index}")
                return instruction if made is None or made.opcode in ("parameter", "tuple") else made
            else:
                return instruction
        return None

    def element(self, operand: str, parameter: str) -> int | None:
        """Find which element of the tuple `parameter` an operand is, if it is one."""
        name, _, index = operand.partition("#")
        if name == parameter and index.isdigit():
            return int(index)
        instruction = self.instructions.get(name)
        if instruction is None or not instruction.operands:
            return None
        if instruction.opcode == "get-tuple-element" and instruction.operands[0] == parameter:
            return int(instruction.attributes["index"])
        if instruction.opcode in ("copy", "bitcast"):
            return self.element(instruction.operands[0], parameter)
        return None

    def integer(self, operand: str) -> int | None:
        """Return the value of an integer scalar that is a constant, or made of constants."""
        source = self.source(operand)
        if source is None:
            return None
        if source.opcode in _FOLDED:
            values = [self.integer(operand) for operand in source.operands]
            return None if None in values else _FOLDED[source.opcode](*values)
        whole = source.opcode == "constant" and re.fullmatch(r"-?\d+", source.literal or "")
        return int(source.literal or "") if whole else None


@dataclass(frozen=True)
class Module:
    """One program as one partition runs it: every shape is one device's."""

    num_partitions: int
    entry: str
    computations: Mapping[str, Computation] = field(repr=False)

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """List every instruction that executes, with how many times it does in one run of the module."""
        for name, times in self.times.items():
            for instruction in self.computations[name].instructions.values():
                yield instruction, times

    @functools.cached_property
    def times(self) -> Mapping[str, int]:
        """Count how often each computation runs: the product of the trip counts of the loops around it.

        A loop whose trip count is not static counts once, each branch of a conditional too. The computations that
        reductions, sorts and scatters apply to elements are not among them.
        """
        times: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name].instructions.values():
                for called, trips in self._calls(name, instruction):
                    visit(called, count * trips)

        visit(self.entry, 1)
        return dict(times)

    def _calls(self, name: str, instruction: Instruction) -> Iterator[tuple[str, int]]:
        attributes = instruction.attributes
        match instruction.opcode:
            case "while":
                trips = self.trip_count(name, instruction)
                yield attributes["body"].lstrip("%"), 1 if trips is None else trips
            case "call" | "fusion" | "async-start":
                if called := attributes.get("to_apply") or attributes.get("calls"):
                    yield called.lstrip("%"), 1
            case "conditional":
                for key in ("branch_computations", "true_computation", "false_computation"):
                    for branch in attributes.get(key, "").strip("{}").split(","):
                        if branch:
                            yield branch.strip().lstrip("%"), 1

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Count how many times a while loop of `computation` runs its body; None when that is not static.

        Read from XLA's own annotation, else from the form `for (i = start; i < limit; i += step)` with constants.
        """
        known = loop.attributes.get("backend_config", "").replace("\\", "").partition('"known_trip_count":{"n":"')[2]
        if known:
            return int(known.partition('"')[0])
        outer = self.computations[computation]
        condition = self.computations[loop.attributes["condition"].lstrip("%")]
        body = self.computations[loop.attributes["body"].lstrip("%")]
        test = condition.root
        if test.opcode != "compare" or len(test.operands) != 2:
            return None
        direction = test.attributes.get("direction")
        counter, bound = test.operands
        index = condition.element(counter, _parameter(condition))
        if index is None:
            counter, bound = bound, counter
            index = condition.element(counter, _parameter(condition))
            direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(str(direction))
        if index is None:
            return None
        limit = self._loop_value(outer, loop, condition, bound, body)
        start = outer.integer(f"{loop.operands[0]}#{index}")
        step = _step(body, index)
        if limit is None or start is None or step is None:
            return None
        return count_trips(start, limit, step, str(direction))

    def _loop_value(
        self, outer: Computation, loop: Instruction, inner: Computation, operand: str, body: Computation
    ) -> int | None:
        """Find a constant of the loop's condition, or one that the loop carries unchanged."""
        value = inner.integer(operand)
        if value is not None:
            return value
        index = inner.element(operand, _parameter(inner))
        if index is None or body.root.opcode != "tuple":
            return None
        if body.element(body.root.operands[index], _parameter(body)) != index:
            return None
        return outer.integer(f"{loop.operands[0]}#{index}")


def _parameter(computation: Computation) -> str:
    return next(i.name for i in computation.instructions.values() if i.opcode == "parameter")


def _step(body: Computation, index: int) -> int | None:
    """Find the constant that the body adds to element `index` of what the loop carries; None for anything else."""
    if body.root.opcode != "tuple":
        return None
    update = body.source(body.root.operands[index])
    if update is None or update.opcode not in ("add", "subtract"):
        return None
    own = [body.element(operand, _parameter(body)) == index for operand in update.operands]
    step = body.integer(update.operands[own.index(False)]) if sorted(own) == [False, True] else None
    if update.opcode == "subtract":
        return -step if step is not None and own[0] else None
    return step


def count_trips(start: int, limit: int, step: int, direction: str) -> int | None:
    """Count the trips of `for (i = start; i <direction> limit; i += step)`; None when it need not end."""
    if direction in ("GT", "GE"):
        start, limit, step, direction = -start, -limit, -step, {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE") or step <= 0:
        return None
    return max(0, -(-(limit + (direction == "LE") - start) // step))
