"""What a training step holds in the memory of one core, by what it is for.

State and batch follow from their shardings. The rest is what XLA's CPU compiler takes for temporaries, read at the
moment when they are most, each value named by the operation that made it. Where that compiler computes in f32 what the
program asked for in bf16, the value counts with the bytes that the program asked for.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainfw.hardware import Topology
from trainfw.hlo import Assignment, Buffer, Instruction, Module, Partitioned, parse_module

if TYPE_CHECKING:
    from trainfw.program import Program

CATEGORIES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "collective_buffers": "collective buffers",
    "data": "data",
    "other": "other temporaries",
    "runtime": "runtime",
}
"""Keys of the table, with what the terminal calls them.

`gradients` are those of parameters. `activations` are what the backward pass keeps or recomputes of the forward pass,
its gradients, and masks. `collective_buffers` are whole weights, gathered or not yet scattered, and what else a
collective takes or returns. `other` are copies, the optimizer's temporaries, what packing wastes, and state that is
neither parameters nor the optimizer's.
"""

_MOVES = {"bitcast", "copy", "reshape", "transpose"}
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
_NARROW = {"bf16", "f16"}
_DEPTH = 4
"""Operations without a name, one after the other, that the compiler is expected to make of one that has it."""
_GIB = 2**30


@dataclass(frozen=True)
class Held:
    """A temporary at the moment when they are most."""

    category: str
    bytes: int
    """As the program asked for it."""
    compiled_bytes: int
    """As the CPU's compiler has it."""
    dims: tuple[int, ...]
    op_name: str
    """JAX's path to the operation that made it."""
    place: str
    """`file:line` of that; empty where the compiler made it by itself."""
    saved: bool
    """Made by the forward pass and held for the backward pass."""


@dataclass(frozen=True)
class MemoryTable:
    """Bytes on one core."""

    categories: Mapping[str, int]
    """Every key of `CATEGORIES`, corrected."""
    capacity: int | None
    """Of the core; None where the topology does not say."""
    arguments: int
    """State and batch, with what of the batch the step never reads; a compiled step's own figure leaves that out."""
    compiled_temporaries: int
    """What the CPU's compiler takes beside them."""
    corrected_bytes: int
    """By how much that is more than the temporaries of the table."""
    corrected_values: int
    """How many of its values are wider than the program asked for, or copies made to widen."""
    largest: tuple[Held, ...]
    """Temporaries at the peak, the largest first."""
    split: bool = True
    """Whether the compiler said what lies where; else all temporaries are `other`, and nothing is corrected."""

    @property
    def total(self) -> int:
        return sum(self.categories.values())

    @property
    def temporaries(self) -> int:
        return self.compiled_temporaries - self.corrected_bytes

    @property
    def saved_activations(self) -> int:
        """Of the activations, what the forward pass leaves for the backward pass."""
        return sum(value.bytes for value in self.largest if value.saved and value.category == "activations")

    @property
    def headroom(self) -> int | None:
        """Of the capacity; less than zero where the step does not fit."""
        return None if self.capacity is None else self.capacity - self.total

    def to_json(self) -> dict[str, int]:
        """Bytes by category, and their `total`."""
        return {**self.categories, "total": self.total}

    def lines(self) -> Iterator[str]:
        """For the terminal: a row a category, the total, what was corrected."""
        whole = self.capacity or self.total
        for key, size in (*self.categories.items(), ("total", self.total)):
            yield f"{CATEGORIES.get(key, key):20}{size / _GIB:9.2f} GiB{100 * size / whole:7.1f}%"
        if self.capacity is not None and self.headroom is not None:
            yield f"{'headroom':20}{self.headroom / _GIB:9.2f} GiB{100 * self.headroom / self.capacity:7.1f}%"
        if not self.split:
            yield "The compiler did not say what its temporaries are: all count as other."
        if self.corrected_bytes:
            yield (
                f"Temporaries are those of XLA's CPU compiler ({self.compiled_temporaries / _GIB:.2f} GiB), less "
                f"{self.corrected_bytes / _GIB:.2f} GiB for {self.corrected_values} values that it widens to f32."
            )
        else:
            yield "Temporaries are those of XLA's CPU compiler; nothing was corrected."

    def __str__(self) -> str:
        return "\n".join(self.lines())


def memory_table(program: Program, partitioned: Partitioned, topology: Topology | None) -> MemoryTable:
    """The table of `program`'s training step, which `partitioned` is the compilation of."""
    import jax

    sizes = dict.fromkeys(CATEGORIES, 0)
    state = program.abstract_state
    for key, tree in (
        ("parameters", state.params),
        ("optimizer_state", state.opt_state),
        ("other", (state.step, state.rng)),
        ("data", program.abstract_batch),
    ):
        sizes[key] += sum(map(_shard_bytes, jax.tree.leaves(tree)))
    arguments = sum(sizes.values())
    analysis = partitioned.compiled.memory_analysis() if partitioned.compiled is not None else None
    outputs = 0 if analysis is None else analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    compiled = 0 if analysis is None else analysis.temp_size_in_bytes
    peak, values = 0, 0
    held: tuple[Held, ...] = ()
    assignment = partitioned.assignment
    if assignment is not None and partitioned.compiled is not None:
        final = _Final(parse_module(partitioned.compiled.as_text()), partitioned.module)
        peak, values, held = _peak(assignment, final, _Known.of(program))
    for value in held:
        sizes[value.category] += value.bytes
    packing = compiled - _occupied(assignment) if assignment is not None else compiled
    sizes["other"] += packing + outputs
    sizes["runtime"] = 0 if topology is None else round(topology.core_overhead)
    capacity = None if topology is None or topology.hbm_size is None else int(topology.hbm_size)
    return MemoryTable(
        categories=sizes,
        capacity=capacity,
        arguments=arguments,
        compiled_temporaries=compiled + outputs,
        corrected_bytes=compiled - packing - peak,
        corrected_values=values,
        largest=tuple(sorted(held, key=lambda value: -value.bytes)),
        split=assignment is not None,
    )


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _occupied(assignment: Assignment) -> int:
    """Bytes of the values alive at the compiler's own peak."""
    change: Counter[int] = Counter()
    for buffer in assignment.buffers:
        change[buffer.start] += buffer.bytes
        change[buffer.end + 1] -= buffer.bytes
    return max(_running(change).values(), default=0)


def _running(change: Mapping[int, int]) -> dict[int, int]:
    total, at = 0, {}
    for time in sorted(change):
        total += change[time]
        at[time] = total
    return at


def _peak(assignment: Assignment, final: _Final, known: _Known) -> tuple[int, int, tuple[Held, ...]]:
    """(bytes at the peak, values corrected anywhere, what is held at the peak), by the program's own dtypes."""
    values: dict[tuple[str, int], list[tuple[Buffer, int]]] = defaultdict(list)
    for buffer in assignment.buffers:
        index = buffer.index[0] if buffer.index else 0
        # Of a value and its widened copies a device without the widening has one.
        key = final.value(buffer.name, index) if final.widens else (buffer.name, index)
        values[key if buffer.shape is not None else (buffer.name, -1)].append((buffer, index))
    change: Counter[int] = Counter()
    asked: dict[tuple[str, int], list[tuple[Buffer, int]]] = {}
    places: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    corrected = 0
    for key, buffers in values.items():
        narrow = final.widens and any(final.is_narrow(buffer, index) for buffer, index in buffers)
        sized = [
            (buffer, buffer.bytes // 2 if narrow and buffer.shape and buffer.shape.dtype == "f32" else buffer.bytes)
            for buffer, _ in buffers
        ]
        corrected += sum(size < buffer.bytes for buffer, size in sized)
        asked[key] = sized
        last = max(buffer.until for buffer, _ in sized)
        for buffer, _ in sized:
            places[buffer.offset, buffer.bytes].append((buffer.start, last))
        times = sorted({time for buffer, _ in sized for time in (buffer.start, buffer.end + 1)})
        before = 0
        for time in times:
            size = max((size for buffer, size in sized if buffer.start <= time <= buffer.end), default=0)
            change[time] += size - before
            before = size
    running = _running(change)
    if not running:
        return 0, 0, ()
    moment = max(running, key=lambda time: running[time])
    backward = [time for time, name in enumerate(assignment.schedule) if final.is_backward(name)]
    held = []
    for sized in asked.values():
        alive = [(buffer, size) for buffer, size in sized if buffer.start <= moment <= buffer.end]
        if not alive:
            continue
        buffer, size = max(alive, key=lambda pair: pair[1])
        first = min(buffer.start for buffer, _ in sized)
        # Until the last copy of what it becomes, where a loop fills it, is gone.
        last = max(
            end
            for buffer, _ in sized
            for start, end in places[buffer.offset, buffer.bytes]
            if buffer.start <= start <= buffer.until
        )
        kept = bisect.bisect_right(backward, last) > bisect.bisect_right(backward, first)
        op_name, place = final.made_by(buffer)
        held.append(
            Held(
                category=_category(buffer, op_name, final, known, kept),
                bytes=size,
                compiled_bytes=sum(buffer.bytes for buffer, _ in alive),
                dims=buffer.shape.dims if buffer.shape else (),
                op_name=op_name,
                place=place,
                saved=kept and _is_forward(op_name) and "rematted_computation" not in op_name,
            )
        )
    return running[moment], corrected, tuple(held)


def _category(buffer: Buffer, op_name: str, final: _Final, known: _Known, kept: bool) -> str:
    """What a temporary is for.

    Args:
        op_name: of the operation whose result it is.
        kept: whether it is held while the backward pass runs.
    """
    if buffer.shape is None or op_name.startswith("state"):
        return "other"
    if op_name.startswith("batch"):
        return "data"
    origin = final.origin(buffer.name, buffer.index[0] if buffer.index else 0)
    dims, key = buffer.shape.dims, _key(buffer.shape.dims)
    forward, backward = _is_forward(op_name), "transpose(" in op_name
    # What a loop adds up or stacks starts as zeros.
    carried = origin.opcode == "while" or final.is_fill(origin)
    weight = key in known.shards or key in known.whole
    if weight and (known.has_tokens(dims) or known.is_logits(dims)):
        # As many tokens as something of the model: only what is plainly of a weight counts as that.
        gathered = origin.opcode == "all-gather" or op_name.endswith("scatter-add")
        weight = gathered or (key in known.stacks and carried and not forward)
    if weight and key in known.shards:
        return "gradients" if (backward or carried) and not forward else "other"
    if weight:
        return "collective_buffers"
    if known.is_logits(dims):
        return "logits_and_loss"
    if forward and kept:
        return "activations"
    if origin.opcode in _COLLECTIVES or final.feeds_collective(buffer.name):
        return "collective_buffers"
    return "activations" if forward or backward or known.has_tokens(dims) else "other"


def _is_forward(op_name: str) -> bool:
    return "rematted_computation" in op_name or ("jvp(" in op_name and "transpose(" not in op_name)


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(dim for dim in dims if dim > 1))


@dataclass(frozen=True)
class _Known:
    """Shapes on one core by which a value is recognised."""

    shards: frozenset[tuple[int, ...]]
    """Of parameters as they are stored, all layers or one, dims sorted."""
    stacks: frozenset[tuple[int, ...]]
    """Those of more than one layer."""
    whole: frozenset[tuple[int, ...]]
    """Those of parameters gathered for use."""
    rows: int
    """Of a microbatch."""
    length: int
    vocabulary: int

    @classmethod
    def of(cls, program: Program) -> _Known:
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        recipe, rules = program.recipe, program.rules
        layers, period = recipe.model.num_layers, len(recipe.model.layer_pattern)
        several = {(layers,), (layers // period, period), (layers // period,)}

        def forms(path: Any, shape: tuple[int, ...]) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
            """As it is used, and stacked."""
            if getattr(path[0], "key", None) != "layers":
                return {_key(shape)}, set()
            return {_key(shape[1:])}, {_key((*stack, *shape[1:])) for stack in several}

        shards: set[tuple[int, ...]] = set()
        stacks: set[tuple[int, ...]] = set()
        whole: set[tuple[int, ...]] = set()
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.abstract_state.params):
            one, stacked = forms(path, leaf.sharding.shard_shape(leaf.shape))
            shards |= one
            stacks |= stacked - one
            gathered = [
                tuple(axis for axis in ((dim,) if isinstance(dim, str) else dim or ()) if axis != "fsdp") or None
                for dim in leaf.sharding.spec
            ]
            used = NamedSharding(program.mesh, PartitionSpec(*gathered))
            whole = whole.union(*forms(path, used.shard_shape(leaf.shape)))
        shards |= stacks
        rows = recipe.train.global_batch_size // recipe.train.accumulation_steps
        logits = (rows, recipe.data.sequence_length, recipe.model.vocab_size)
        local = rules.sharding("logits", logits, ("batch", "sequence", "act_vocab")).shard_shape(logits)
        return cls(frozenset(shards), frozenset(stacks), frozenset(whole - shards), *local)

    def has_tokens(self, dims: tuple[int, ...]) -> bool:
        """Whether there is a dim of places in a sequence, or of all tokens of a microbatch."""
        return self.length in dims or self.rows * self.length in dims

    def is_logits(self, dims: tuple[int, ...]) -> bool:
        return _key(dims) in (
            _key((self.rows, self.length, self.vocabulary)),
            _key((self.rows * self.length, self.vocabulary)),
        )


class _Final:
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
        """Whether there is anything that the CPU would widen."""

    def _instruction(self, name: str) -> Instruction:
        return self._home[name].instructions[name]

    def _inside(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of a fusion, its root last; of anything else, itself."""
        if instruction.opcode != "fusion":
            return [instruction]
        return list(self._module.computations[instruction.attributes["calls"].lstrip("%")].instructions.values())

    @functools.cache  # noqa: B019  lives as long as one table takes
    def _step(self, name: str, index: int) -> tuple[str, int, str] | None:
        """What a value was before this instruction: (name, index, "same" | "moved" | "cast" | "widened")."""
        home, instruction = self._home[name], self._instruction(name)
        if instruction.opcode == "get-tuple-element":
            return instruction.operands[0].partition("#")[0], int(instruction.attributes["index"]), "same"
        if instruction.opcode == "tuple":
            return (*_operand(instruction.operands[index]), "same")
        if instruction.opcode == "bitcast":
            return (*_operand(instruction.operands[0]), "same")
        if instruction.opcode == "parameter" and home.name in self._loops:
            return self._loops[home.name], index, "same"
        if instruction.opcode == "while":
            body = self._module.computations[instruction.attributes["body"].lstrip("%")]
            returned = body.root.operands[index] if body.root.opcode == "tuple" else body.root.name
            source = body.source(returned)
            while source is not None and source.opcode == "get-tuple-element":
                inner = self._instruction(source.operands[0].partition("#")[0])
                if inner.opcode == "parameter" and int(source.attributes["index"]) == index:
                    return (*_element(instruction.operands[0], index), "same")
                if inner.opcode != "while":
                    break
                before = self._step(inner.name, int(source.attributes["index"]))
                source = None if before is None else self._trace_in(body.name, before)
            return None
        inside = self._inside(instruction)
        if not instruction.operands or not all(i.opcode in _MOVES | {"convert", "parameter"} for i in inside):
            return None
        if instruction.opcode == "parameter" or len(instruction.operands) != 1:
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
        seen = set()
        while (name, index) not in seen:
            seen.add((name, index))
            before = self._step(name, index)
            if before is None or before[2] in ("moved", "cast"):
                break
            name, index = before[:2]
        return name, index

    def _chain(self, name: str, index: int) -> Iterator[Instruction]:
        """An instruction and those before it, as long as they hold the same elements."""
        seen = set()
        while (name, index) not in seen:
            seen.add((name, index))
            yield self._instruction(name)
            before = self._step(name, index)
            if before is None:
                break
            name, index = before[:2]

    def origin(self, name: str, index: int) -> Instruction:
        """Where the elements of a value were computed: no copy, cast or loop that only carries it."""
        return list(self._chain(name, index))[-1]

    def made_by(self, buffer: Buffer) -> tuple[str, str]:
        """(op_name, place) of the operation whose result a value is; of what it was made from, where it has no name."""
        name, index = buffer.name, buffer.index[0] if buffer.index else 0
        for _ in range(_DEPTH):
            for instruction in self._chain(name, index):
                named = [i for i in (instruction, *reversed(self._inside(instruction))) if i.op_name]
                if named and instruction.opcode not in ("copy", "get-tuple-element"):
                    place = next((i.place for i in named if i.place is not None), None)
                    return named[0].op_name, str(place or "")
            if not instruction.operands:
                break
            operands = self._home[instruction.name].instructions
            name, index = max(map(_operand, instruction.operands), key=lambda at: operands[at[0]].bytes)
        return "", ""

    def is_narrow(self, buffer: Buffer, index: int) -> bool:
        """Whether the program asked for two bytes an element where the CPU's compiler may have four."""
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
        return name in self._home and "transpose(" in self._instruction(name).op_name

    def feeds_collective(self, name: str) -> bool:
        users = self._home[name].users.get(name, ())
        return any(
            user.opcode in _COLLECTIVES or (user.opcode == "bitcast" and self.feeds_collective(user.name))
            for user in users
        )


def _operand(text: str) -> tuple[str, int]:
    name, _, index = text.partition("#")
    return name, int(index or 0)


def _element(text: str, index: int) -> tuple[str, int]:
    return text.partition("#")[0], index
