"""The module that XLA's CPU compiler ends with, beside what the program asked for."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator

from trainfw.hlo import Buffer, Instruction, Module
from trainfw.planning.read_step.op_names import is_backward

COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
_MOVES = {"bitcast", "copy", "reshape", "transpose"}
_NARROW = {"bf16", "f16"}
_DEPTH = 4
"""Operations without a name, one after the other, that the compiler is expected to make of one that has it."""


class Final:
    """The module that the CPU's compiler ended with, and which of its values the partitioned one had narrower."""

    def __init__(self, module: Module, partitioned: Module):
        self._module = module
        self._home = {name: c for c in module.computations.values() for name in c.instructions}
        self._loops = {
            i.attributes[key].lstrip("%"): i.name
            for c in module.computations.values()
            for i in c.instructions.values()
            if i.opcode == "while"
            for key in ("body", "condition")
        }
        dtypes: dict[tuple[str, int], set[str]] = defaultdict(set)
        casts: set[tuple[str, str, int]] = set()
        for instruction, _ in partitioned.instructions():
            for shape in instruction.shapes:
                elements = math.prod(shape.dims)
                if instruction.opcode == "convert":
                    casts.add((instruction.op_name, shape.dtype, elements))
                dtypes[instruction.op_name, elements].add(shape.dtype)
        self._dtypes, self._casts = dict(dtypes), casts
        self.widens = any(found & _NARROW for found in dtypes.values())
        """True where there is anything that the CPU would widen."""

    def _instruction(self, name: str) -> Instruction:
        return self._home[name].instructions[name]

    def _inside(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of a fusion, its root last; of anything else, itself."""
        if instruction.opcode != "fusion":
            return [instruction]
        return list(self._module.computations[instruction.attributes["calls"].lstrip("%")].instructions.values())

    @functools.cache  # noqa: B019  lives as long as one table takes
    def _step(self, name: str, index: int) -> tuple[str, int, str] | None:
        """Return what a value was before this instruction: (name, index, "same" | "moved" | "cast" | "widened")."""
        home, instruction = self._home[name], self._instruction(name)
        if instruction.opcode == "get-tuple-element":
            return _operand(instruction.operands[0])[0], int(instruction.attributes["index"]), "same"
        if instruction.opcode in ("tuple", "bitcast"):
            return (*_operand(instruction.operands[index if instruction.opcode == "tuple" else 0]), "same")
        if instruction.opcode == "parameter" and home.name in self._loops:
            return self._loops[home.name], index, "same"
        if instruction.opcode == "while":
            body = self._module.computations[instruction.attributes["body"].lstrip("%")]
            returned = body.root.operands[index] if body.root.opcode == "tuple" else body.root.name
            source = body.source(returned)
            while source is not None and source.opcode == "get-tuple-element":
                inner = self._instruction(source.operands[0].partition("#")[0])
                if inner.opcode == "parameter" and int(source.attributes["index"]) == index:
                    return _operand(instruction.operands[0])[0], index, "same"
                if inner.opcode != "while":
                    break
                before = self._step(inner.name, int(source.attributes["index"]))
                source = None if before is None else self._trace_in(body.name, before)
            return None
        inside = self._inside(instruction)
        if len(instruction.operands) != 1 or not all(i.opcode in _MOVES | {"convert", "parameter"} for i in inside):
            return None
        converts = [i for i in inside if i.opcode == "convert"]
        kind = "moved"
        if converts:
            own = any((i.op_name, i.shapes[0].dtype, math.prod(i.shapes[0].dims)) in self._casts for i in converts)
            kind = "cast" if own else "widened"
        return (*_operand(instruction.operands[0]), kind)

    def _trace_in(self, computation: str, at: tuple[str, int, str]) -> Instruction | None:
        """The get-tuple-element or other instruction of `computation` behind a value in it."""
        name, index, _ = at
        instruction = self._instruction(name)
        if self._home[name].name != computation:
            return None
        if instruction.opcode == "tuple":
            return self._home[name].source(instruction.operands[index])
        return instruction

    def value(self, name: str, index: int) -> tuple[str, int]:
        """The instruction that made the value that this one holds, casts that the compiler added undone."""
        *_, last = self._before(name, index, ("same", "widened"))
        return last

    def _before(self, name: str, index: int, how: Collection[str]) -> Iterator[tuple[str, int]]:
        """A value and those that it was before, as long as they are related in one of these ways."""
        seen = set()
        while (name, index) not in seen:
            seen.add((name, index))
            yield name, index
            before = self._step(name, index)
            if before is not None and before[2] in how:
                name, index = before[:2]

    def _chain(self, name: str, index: int) -> Iterator[Instruction]:
        """An instruction and those before it, as long as they hold the same elements."""
        return (self._instruction(name) for name, _ in self._before(name, index, ("same", "widened", "moved", "cast")))

    def origin(self, name: str, index: int) -> Instruction:
        """Find the instruction that computed a value's elements: no copy, cast or loop that only carries it."""
        return list(self._chain(name, index))[-1]

    def made_by(self, buffer: Buffer) -> tuple[str, str]:
        """(op_name, place) of the operation whose result a value is; of what it was made from, where it has no name."""
        name, index = buffer.name, buffer.index[0] if buffer.index else 0
        for _ in range(_DEPTH):
            for instruction in self._chain(name, index):
                inside = (instruction, *reversed(self._inside(instruction)))
                # Copies that the compiler adds may have the name of all that runs on a device.
                named = [i for i in inside if i.op_name and not i.op_name.endswith("/shard_map")]
                if named and instruction.opcode not in ("copy", "get-tuple-element"):
                    place = next((i.place for i in named if i.place is not None), None)
                    return named[0].op_name, str(place or "")
            if not instruction.operands:
                break
            operands = self._home[instruction.name].instructions
            name, index = max(map(_operand, instruction.operands), key=lambda at: operands[at[0]].bytes)
        return "", ""

    def is_narrow(self, buffer: Buffer, index: int) -> bool:
        """Tell whether the program asked for two bytes an element where the CPU's compiler may have four."""
        if buffer.shape is None or buffer.shape.dtype not in _NARROW | {"f32"}:
            return False
        before = self._step(buffer.name, index)
        inside = self._inside(self._instruction(buffer.name))
        if before is not None and before[2] == "widened":
            return any(shape.dtype in _NARROW for i in inside for shape in i.shapes)
        if before is not None or buffer.shape.dtype in _NARROW:
            return buffer.shape.dtype in _NARROW
        op_name = next((i.op_name for i in reversed(inside) if i.op_name), "")
        asked = self._dtypes.get((op_name, math.prod(buffer.shape.dims)), set())
        return bool(asked & _NARROW) and "f32" not in asked

    def is_fill(self, instruction: Instruction) -> bool:
        return self._inside(instruction)[-1].opcode in ("broadcast", "constant")

    def is_backward(self, name: str) -> bool:
        return name in self._home and is_backward(self._instruction(name).op_name)

    def feeds_collective(self, name: str) -> bool:
        users = self._home[name].users.get(name, ())
        return any(
            user.opcode in COLLECTIVES or (user.opcode == "bitcast" and self.feeds_collective(user.name))
            for user in users
        )


def _operand(text: str) -> tuple[str, int]:
    name, _, index = text.partition("#")
    return name, int(index or 0)
