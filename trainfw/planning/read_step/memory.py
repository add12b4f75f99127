"""Memory of one core in a training step, by what it is for.

State and batch follow from their shardings. The rest is what XLA's CPU compiler takes for temporaries, read at the
moment when they are most, each value named by the operation that made it. Where that compiler computes in f32 what the
program asked for in bf16, the value counts with the bytes that the program asked for.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainfw import backends
from trainfw.backends import Sdk
from trainfw.errors import UserError
from trainfw.hardware import Topology
from trainfw.hlo import Assignment, Buffer, Partitioned, parse_module
from trainfw.models import vocabulary_of
from trainfw.parallel import SPLIT_RULES, Layout, nearest_divisors
from trainfw.planning.read_step.final_module import COLLECTIVES, Final
from trainfw.planning.read_step.op_names import is_backward, is_forward, is_recomputed, is_within
from trainfw.scopes import LOSS

if TYPE_CHECKING:
    from trainfw.program import Program

CATEGORIES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "state_out": "state written anew",
    "activations": "activations",
    "logits_and_loss": "predictions and loss",
    "collective_buffers": "collective buffers",
    "data": "data",
    "other": "other temporaries",
    "runtime": "runtime",
}
"""Keys of the table, with what the terminal calls them.

`gradients` are those of parameters. `activations` are what the backward pass keeps or recomputes of the forward pass,
its gradients, and masks. `collective_buffers` are whole weights, gathered or not yet scattered, and what else a
collective takes or returns. `other` are copies, the optimizer's temporaries, what packing wastes, and state that is
neither parameters nor the optimizer's. `state_out` is the state that a step writes, where `backend.donate` is false and
it does not take the place of the one it reads: only then is the key there.
"""

_GIB = 2**30


@dataclass(frozen=True)
class StateArray:
    """An array of the training state, and how it is sharded."""

    name: str
    """A parameter's dotted name, or where it is in the state, such as `opt_state.1.0.mu.final_norm.scale`."""
    category: str
    dims: tuple[int, ...]
    """Shape of the whole array."""
    itemsize: int
    axes: tuple[tuple[str, ...], ...]
    """Mesh axes that shard each dim."""

    def bytes_on(self, layout: Layout) -> int:
        """Count the bytes that one core holds of it. Raises UserError where a dim does not divide."""
        size = self.itemsize
        for number, (dim, axes) in enumerate(zip(self.dims, self.axes, strict=True)):
            parts = math.prod(layout.sizes[axis] for axis in axes)
            if dim % parts:
                product = " * ".join(f"{axis}({layout.sizes[axis]})" for axis in axes)
                raise UserError(
                    f"{self.name}: dim {number} (size {dim:,}) does not divide over mesh axes {product} = {parts:,}"
                    f"{nearest_divisors(dim, parts)}"
                )
            size *= dim // parts
        return size


@dataclass(frozen=True)
class Held:
    """A temporary at the moment when they are most."""

    category: str
    bytes: int
    """Bytes as the program asked for them."""
    dims: tuple[int, ...]
    op_name: str
    """JAX's path to the operation that made it."""
    place: str
    """`file:line` of that; empty where the compiler made it by itself."""
    saved: bool
    """Made by the forward pass and held for the backward pass."""
    shard: bool = False
    """A core's own part of a weight that `fsdp` shards, or of what is computed from one, such as its gradient."""


@dataclass(frozen=True, repr=False)
class MemoryTable:
    """Bytes on one core."""

    categories: Mapping[str, int]
    """The keys of `CATEGORIES`, corrected."""
    capacity: int | None
    """Capacity of the core; None where the topology does not say, or none is known yet."""
    arguments: int
    """State and batch, with what of the batch the step never reads; a compiled step's own figure leaves that out."""
    compiled_temporaries: int
    """Bytes that the CPU's compiler takes beside them."""
    corrected_bytes: int
    """Excess of that over the temporaries of the table."""
    corrected_values: int
    """Number of its values that are wider than the program asked for, or copies made to widen."""
    largest: tuple[Held, ...]
    """Temporaries at the peak, the largest first."""
    split: bool = True
    """True where the compiler said what lies where; else all temporaries are `other`, and nothing is corrected."""
    state: tuple[StateArray, ...] = ()
    runtime: str = CATEGORIES["runtime"]
    """Name of the runtime that takes what is under that key."""
    note: str = ""

    @property
    def total(self) -> int:
        return sum(self.categories.values())

    @property
    def temporaries(self) -> int:
        return self.compiled_temporaries - self.corrected_bytes

    @property
    def headroom(self) -> int | None:
        """Subtract the total from the capacity; less than zero where the step does not fit."""
        return None if self.capacity is None else self.capacity - self.total

    def on(self, topology: Topology, sdk: Sdk) -> MemoryTable:
        """The same step on a core of `topology`: with what its runtime takes (on Neuron, that of `sdk`), and its
        capacity."""
        return replace(
            self,
            categories={**self.categories, "runtime": sdk.core_overhead(topology)},
            runtime=f"runtime, SDK {sdk.version}" if backends.for_topology(topology).has_sdk else CATEGORIES["runtime"],
            capacity=None if topology.hbm_size is None else int(topology.hbm_size),
        )

    def lengthened(self, simulated: Layout, layout: Layout) -> MemoryTable:
        """Compute the table of a core of `layout` from that of a program compiled for `simulated`, of shorter axes.

        State is exact. Of the temporaries, shards shrink as `fsdp` grows; whole weights and activations stay, and so
        does the moment that counts as the peak (at another one temporaries may be more, by less than shards shrink).
        Raises UserError where the state does not divide.
        """
        sizes = dict(self.categories)
        for array in self.state:
            sizes[array.category] += array.bytes_on(layout) - array.bytes_on(simulated)
        arguments = self.arguments + sum(sizes.values()) - sum(self.categories.values())
        compiled = self.compiled_temporaries
        if "state_out" in sizes:
            sizes["state_out"] = sum(array.bytes_on(layout) for array in self.state)
            compiled += sizes["state_out"] - self.categories["state_out"]
        exact = replace(self, categories=sizes, arguments=arguments, compiled_temporaries=compiled)
        times = layout.fsdp // simulated.fsdp
        if times == 1:
            return exact
        largest = [replace(value, bytes=value.bytes // times) if value.shard else value for value in self.largest]
        for value, shorter in zip(self.largest, largest, strict=True):
            sizes[value.category] -= value.bytes - shorter.bytes
        saved = sum(value.bytes for value in self.largest) - sum(value.bytes for value in largest)
        return replace(
            exact,
            compiled_temporaries=compiled - saved,
            largest=tuple(sorted(largest, key=lambda value: -value.bytes)),
            note=f"Compiled for fsdp({simulated.fsdp}), {times} times shorter: state is exact, and shards of weights "
            f"among the temporaries count 1/{times} ({saved / _GIB:.2f} GiB less).",
        )

    def to_json(self) -> dict[str, int]:
        """Bytes by category, and their `total`."""
        return {**self.categories, "total": self.total}

    def lines(self) -> Iterator[str]:
        """Write lines for the terminal: a row a category, the total, what was corrected."""
        whole = self.capacity or self.total
        for key, size in (*self.categories.items(), ("total", self.total)):
            label = self.runtime if key == "runtime" else CATEGORIES.get(key, key)
            yield f"{label:20}{size / _GIB:9.2f} GiB{100 * size / whole:8.1f}%"
        if self.capacity is not None and self.headroom is not None:
            yield f"{'headroom':20}{self.headroom / _GIB:9.2f} GiB{100 * self.headroom / self.capacity:8.1f}%"
        if not self.split:
            yield "The compiler did not say what its temporaries are: all count as other."
        if self.corrected_bytes:
            yield (
                f"Temporaries are those of XLA's CPU compiler ({self.compiled_temporaries / _GIB:.2f} GiB), less "
                f"{self.corrected_bytes / _GIB:.2f} GiB for {self.corrected_values} values that it widens to f32."
            )
        else:
            yield "Temporaries are those of XLA's CPU compiler; nothing was corrected."
        if self.note:
            yield self.note

    def __repr__(self) -> str:
        of = "" if self.capacity is None else f" of {self.capacity / _GIB:.2f}"
        return f"<MemoryTable: {self.total / _GIB:.2f}{of} GiB a core>"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def memory_table(program: Program, partitioned: Partitioned) -> MemoryTable:
    """The table of `program`'s training step, which `partitioned` is the compilation of; see `MemoryTable.on`."""
    import jax

    state, donates = tuple(state_arrays(program)), program.recipe.backend.donate
    sizes = {name: 0 for name in CATEGORIES if name != "state_out" or not donates}
    for array in state:
        sizes[array.category] += array.bytes_on(program.layout)
    for leaf in jax.tree.leaves(program.abstract_batch):
        sizes["data"] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    arguments = sum(sizes.values())
    analysis = partitioned.compiled.memory_analysis() if partitioned.compiled is not None else None
    outputs = 0 if analysis is None else analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    compiled = 0 if analysis is None else analysis.temp_size_in_bytes
    occupied, peak, values, held = _peak(partitioned, _Known.of(program))
    for value in held:
        sizes[value.category] += value.bytes
    packing = compiled - occupied
    sizes["other"] += packing + outputs
    if not donates:
        sizes["state_out"] = sum(array.bytes_on(program.layout) for array in state)
        sizes["other"] -= min(sizes["state_out"], outputs)
        outputs = max(sizes["state_out"], outputs)
    return MemoryTable(
        categories=sizes,
        capacity=None,
        arguments=arguments,
        compiled_temporaries=compiled + outputs,
        corrected_bytes=compiled - packing - peak,
        corrected_values=values,
        largest=tuple(sorted(held, key=lambda value: -value.bytes)),
        split=partitioned.assignment is not None,
        state=state,
    )


def corrected_temporaries(partitioned: Partitioned, narrow: Collection[str] = ()) -> int | None:
    """Bytes of a program's temporaries and results, by its own dtypes; None where the compiler does not say.

    Args:
        narrow: names of arguments of which the CPU's compiler alone keeps a copy, to widen it; it is left out.
    """
    analysis = partitioned.compiled.memory_analysis() if partitioned.compiled is not None else None
    if analysis is None:
        return None
    occupied, peak, _, held = _peak(partitioned, _Known())
    peak -= sum(value.bytes for value in held if value.op_name.partition("[")[0] in narrow)
    return analysis.temp_size_in_bytes - occupied + peak + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def state_arrays(program: Program) -> Iterator[StateArray]:
    """All that a step hands to the next."""
    import jax

    categories = {"params": "parameters", "frozen": "parameters", "opt_state": "optimizer_state"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.abstract_state):
        name, axes = jax.tree_util.keystr(path, simple=True, separator="."), _axes(leaf.sharding.spec)
        axes += ((),) * (len(leaf.shape) - len(axes))
        category = categories.get(name.partition(".")[0], "other")
        yield StateArray(name.removeprefix("params."), category, tuple(leaf.shape), leaf.dtype.itemsize, axes)


def _axes(spec: Any) -> tuple[tuple[str, ...], ...]:
    return tuple((dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in spec)


def _occupied(assignment: Assignment) -> int:
    """Bytes of the values alive at the compiler's own peak."""
    change: Counter[int] = Counter()
    for buffer in assignment.buffers:
        change[buffer.start] += buffer.bytes
        change[buffer.end + 1] -= buffer.bytes
    return max(_running(change).values(), default=0)


def _running(change: Mapping[int, int]) -> dict[int, int]:
    times = sorted(change)
    return dict(zip(times, itertools.accumulate(change[time] for time in times)))


def _peak(partitioned: Partitioned, known: _Known) -> tuple[int, int, int, tuple[Held, ...]]:
    """(bytes at the compiler's peak; bytes at the peak, values corrected anywhere, what is held at the peak, by the
    program's own dtypes); nothing where the compiler does not say what lies where."""
    assignment = partitioned.assignment
    if assignment is None or partitioned.compiled is None:
        return 0, 0, 0, ()
    final = Final(parse_module(partitioned.compiled.as_text()), partitioned.module)
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
        before = 0
        for time in sorted({time for buffer, _ in sized for time in (buffer.start, buffer.end + 1)}):
            size = max((size for buffer, size in sized if buffer.start <= time <= buffer.end), default=0)
            change[time] += size - before
            before = size
    running = _running(change)
    if not running:
        return 0, 0, 0, ()
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
        category = _category(buffer, op_name, final, known, kept)
        form = _key(buffer.shape.dims) if buffer.shape else ()
        held.append(
            Held(
                category=category,
                bytes=size,
                dims=buffer.shape.dims if buffer.shape else (),
                op_name=op_name,
                place=place,
                saved=kept and is_forward(op_name) and not is_recomputed(op_name),
                shard=category in ("gradients", "other") and form in known.fsdp_shards,
            )
        )
    return _occupied(assignment), running[moment], corrected, tuple(held)


def _category(buffer: Buffer, op_name: str, final: Final, known: _Known, kept: bool) -> str:
    """Name what a temporary of operation `op_name` is for; `kept` is held while the backward pass runs."""
    if buffer.shape is None or op_name.startswith("state"):
        return "other"
    if op_name.startswith("batch"):
        return "data"
    origin = final.origin(buffer.name, buffer.index[0] if buffer.index else 0)
    dims, key = buffer.shape.dims, _key(buffer.shape.dims)
    forward, backward = is_forward(op_name), is_backward(op_name)
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
    if known.is_logits(dims) or (not known.logits and is_within(op_name, LOSS)):
        return "logits_and_loss"
    if forward and kept:
        return "activations"
    if origin.opcode in COLLECTIVES or final.feeds_collective(buffer.name):
        return "collective_buffers"
    return "activations" if forward or backward or known.has_tokens(dims) else "other"


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(dim for dim in dims if dim > 1))


@dataclass(frozen=True)
class _Known:
    """Shapes on one core by which a value is recognised."""

    shards: frozenset[tuple[int, ...]] = frozenset()
    """Shapes of parameters' gradients as they are kept, all layers or one, dims sorted."""
    stacks: frozenset[tuple[int, ...]] = frozenset()
    """Shapes of `shards` that have more than one layer."""
    fsdp_shards: frozenset[tuple[int, ...]] = frozenset()
    """Shapes of `shards` that `fsdp` alone can have made."""
    whole: frozenset[tuple[int, ...]] = frozenset()
    """Shapes of parameters gathered for use."""
    tokens: frozenset[int] = frozenset()
    """Sizes of dims that are places in a sequence, or tokens (or patches) of a microbatch or of a chunk of the loss."""
    logits: tuple[int, ...] = ()
    """Shape of the logits of a chunk of the loss, dims sorted; empty for a model without a vocabulary."""

    @classmethod
    def of(cls, program: Program) -> _Known:
        import jax
        from flax import nnx

        from trainfw.objectives import loss_chunks

        recipe, rules, layout = program.recipe, program.rules, program.layout
        layers, period = recipe.model.num_layers // layout.pipeline, recipe.model.layer_period
        several = {(layers,), (layers // period, period), (layers // period,)}

        def forms(path: Any, shape: tuple[int, ...]) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
            """List the forms of a shape: as it is used, and stacked."""
            if getattr(path[0], "key", None) != "layers":
                return {_key(shape)}, set()
            return {_key(shape[1:])}, {_key((*stack, *shape[1:])) for stack in several}

        shards, stacks, whole, others = (set[tuple[int, ...]]() for _ in range(4))
        params = jax.tree_util.tree_leaves_with_path(program.abstract_state.params)
        weights = jax.tree.leaves(program.models.variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        for (path, leaf), kept, weight in zip(params, jax.tree.leaves(program.grad_shardings), weights, strict=True):
            one, stacked = forms(path, kept.shard_shape(leaf.shape))
            shards |= one
            stacks |= stacked - one
            if "fsdp" not in itertools.chain(*_axes(kept.spec)):
                others |= one | stacked
            used = jax.sharding.NamedSharding(program.mesh, rules.spec(str(path), leaf.shape, weight.axes, in_use=True))
            whole = whole.union(*forms(path, used.shard_shape(leaf.shape)))
        for path, part, dims in _frozen_arrays(program):
            used = jax.sharding.NamedSharding(program.mesh, rules.spec(str(path), part.shape, dims, in_use=True))
            whole = whole.union(*forms(path, used.shard_shape(part.shape)))
        shards |= stacks
        rows = recipe.train.global_batch_size // layout.batch_shards // recipe.train.accumulation_steps * recipe.group
        length = recipe.sequence_length // layout.context
        tokens = rows * length
        vocabulary = vocabulary_of(recipe.model)
        chunk = tokens // loss_chunks(tokens, recipe.train.loss_chunk) if vocabulary else tokens
        lengths = {length, length // layout.tensor}
        return cls(
            shards=frozenset(shards),
            stacks=frozenset(stacks),
            fsdp_shards=frozenset(shards - others),
            whole=frozenset(whole - shards),
            tokens=frozenset({*lengths, *(rows * part for part in lengths), chunk}),
            logits=_key((chunk, vocabulary // layout.tensor)) if vocabulary else (),
        )

    def has_tokens(self, dims: tuple[int, ...]) -> bool:
        return bool(self.tokens & {*dims})

    def is_logits(self, dims: tuple[int, ...]) -> bool:
        return bool(self.logits) and _key(dims) == self.logits


def _frozen_arrays(program: Program) -> Iterator[tuple[tuple[Any, ...], Any, tuple[str | None, ...]]]:
    """(path, array, names of its dims) of what does not learn: of a quantised weight its arrays, and what it is for."""
    import jax
    from flax import nnx

    from trainfw.quantization import Quantized

    for role, variables in program.models.frozen.items():
        leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        kept = jax.tree.leaves(program.abstract_state.frozen[role], is_leaf=lambda leaf: isinstance(leaf, Quantized))
        for (path, weight), value in zip(leaves, kept, strict=True):
            yield path, jax.ShapeDtypeStruct(value.shape, "float32"), weight.axes
            if isinstance(value, Quantized):
                names = value.dims(weight.axes, SPLIT_RULES)
                yield from ((path, getattr(value, f), getattr(names, f)) for f in ("codes", "scales"))
