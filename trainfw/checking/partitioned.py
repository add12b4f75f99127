"""Rules on a program as one core runs it: its collectives, its buffers, its memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from trainfw.backends import Sdk
from trainfw.checking.report import CollectiveSum, Finding, Memory
from trainfw.hardware import Topology
from trainfw.hlo import Collective, Module, Partitioned, collectives_of
from trainfw.parallel import group_problem, permute_problem

_WRITTEN_OUT = {
    *("dot", "convolution", "gather", "scatter", "sort", "concatenate", "dynamic-update-slice", "custom-call"),
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "rng-bit-generator"),
}
"""Opcodes whose results no compiler fuses away."""
_MANY_ARGUMENTS = 128
"""The most that were measured to be cheap (rule `arguments-many`)."""


def read_partitioned(
    module: Module, cores: list[int], mesh: jax.sharding.Mesh | None, topology: Topology, sdk: Sdk
) -> list[Finding]:
    """List the findings in a partitioned module: `cores` of its partitions, in groups named by the axes of `mesh`."""
    found = collectives_of(module)
    findings = []
    for collective in found:
        integers = [shape for shape in collective.instruction.shapes if shape.dtype[0] in "su"]
        if collective.kind in ("all-reduce", "reduce-scatter") and integers:
            message = f"{collective.kind} of {integers[0]} over {_among(collective, mesh)}"
            findings.append(_finding(f"collective-integer-{collective.kind}", message, collective))
    findings += _groups(found, cores, mesh, topology)
    # The first of each communicator.
    users = list({_key(collective): collective for collective in reversed(found) if collective.groups}.values())[::-1]
    if len(users) > sdk.communicators:
        names = "; ".join(_among(collective, mesh) for collective in users)
        message = f"{len(users)} sets of groups, of {sdk.communicators} that SDK {sdk.version} allows: {names}"
        findings.append(_finding("communicators", message, users[sdk.communicators]))  # the first that is too many
    return [*findings, *_buffers(module, sdk)]


def is_partitioned(module: Module) -> bool:
    """Tell whether XLA came as far as partitioning: before, shapes are of whole arrays and collectives few."""
    return not any(
        instruction.attributes.get("custom_call_target", "").strip('"').startswith(("xla.sdy.", "Sharding", "SPMD"))
        or "xla.sdy." in instruction.attributes.get("frontend_attributes", "")
        for instruction, _ in module.instructions()
    )


def sum_collectives(module: Module, mesh: jax.sharding.Mesh | None) -> tuple[CollectiveSum, ...]:
    """Sum the collectives by kind, axes, dtype and size of group, the most bytes first."""
    counts: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
    for collective in collectives_of(module):
        axes = collective.axes(mesh) if mesh is not None else None
        total = counts[collective.kind, collective.scattered, axes, collective.dtype, collective.group_size]
        total[0] += collective.times
        total[1] += collective.bytes * collective.times
    rows = [
        CollectiveSum(kind, scattered, axes, dtype, group_size, count, size)
        for (kind, scattered, axes, dtype, group_size), (count, size) in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def memory_of(
    arguments: Sequence[jax.ShapeDtypeStruct], partitioned: Partitioned | None, topology: Topology, sdk: Sdk
) -> Memory:
    """Compute the memory of one core for a function of these arguments (ShapeDtypeStructs).

    Where they do not say how they are split, the function may (`jax.jit(..., in_shardings=...)`).
    """
    compiled = partitioned.compiled if partitioned is not None else None
    of_inputs = () if compiled is None else compiled.input_shardings[0]
    chosen: list[Any] = jax.tree.leaves(of_inputs, is_leaf=lambda sharding: sharding is None)
    if len(chosen) != len(arguments):
        chosen = [None] * len(arguments)
    size = 0
    for leaf, sharding in zip(arguments, chosen, strict=True):
        sharding = leaf.sharding or sharding
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        size += math.prod(shape) * _itemsize(leaf.dtype)
    analysis = compiled.memory_analysis() if compiled is not None else None
    temporaries = None
    if analysis is not None:
        temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(size, sdk.core_overhead(topology), temporaries, topology.hbm_size)


def read_arguments(arguments: Sequence[object]) -> Iterator[Finding]:
    if len(arguments) > _MANY_ARGUMENTS:
        message = f"{len(arguments)} arrays; {_MANY_ARGUMENTS} were measured to take 8 ms a call, 512 418 ms"
        yield Finding("arguments-many", message)


def read_memory(memory: Memory) -> Iterator[Finding]:
    if memory.capacity is None:
        return
    needed, temporaries = memory.arguments + memory.overhead, memory.temporaries or 0
    sizes = (memory.arguments, memory.overhead, memory.capacity, temporaries, needed)
    arguments, overhead, core, taken, beside = (f"{size / 2**30:.2f} GiB" for size in sizes)
    if needed > memory.capacity:
        message = f"{arguments} of state and inputs and {overhead} of runtime on a core of {core}"
        yield Finding("memory-arguments", message)
    elif needed + temporaries > memory.capacity:
        yield Finding(
            "memory-temporaries",
            f"{taken} of temporaries beside {beside} of state, inputs and runtime, on a core of {core}; the "
            "temporaries are what XLA's CPU compiler takes, which widens bf16 to f32 and so overstates; `trainfw plan` "
            "counts them as the program asked for",
        )


def _groups(
    found: list[Collective], cores: list[int], mesh: jax.sharding.Mesh | None, topology: Topology
) -> Iterator[Finding]:
    """Report one finding for each set of groups that is refused, at the first collective that uses it."""
    by_groups: dict[Any, list[Collective]] = defaultdict(list)
    for collective in found:
        by_groups[_key(collective)].append(collective)
    for first, *others in by_groups.values():
        if first.pairs:
            problem = permute_problem(topology, [(cores[a], cores[b]) for a, b in first.pairs])
            rule, why = ("", None) if problem is None else (f"permute-{problem[0]}", problem[1])
        else:
            problems = (group_problem(topology, [cores[device] for device in group]) for group in first.groups)
            rule, why = "collective-group", next(filter(None, problems), None)
        if why is not None:
            users = (first, *others)
            kinds = ", ".join(dict.fromkeys(user.kind for user in users))
            yield _finding(rule, f"{kinds} over {_among(first, mesh)}: {why}", first, len(users))


def _buffers(module: Module, sdk: Sdk) -> Iterator[Finding]:
    entry = module.computations[module.entry]
    limit, gb = sdk.max_tensor_bytes, 1e9
    inputs = [i for i in entry.instructions.values() if i.opcode == "parameter"]
    for instruction in inputs:
        for shape in instruction.shapes:
            if shape.bytes >= limit:
                user = next((i for i in entry.instructions.values() if instruction.name in i.operands), instruction)
                message = f"input {instruction.op_name or instruction.name} is {shape.bytes / gb:.1f} GB on one core"
                yield Finding("buffer-size", message, instruction.place or user.place, instruction.op_name)
    known = {(shape.dtype, shape.dims) for instruction in inputs for shape in instruction.shapes}
    root = entry.root
    outputs = root.operands if root.opcode == "tuple" and len(root.operands) == len(root.shapes) else ()
    # The shapes of the root: what a loop returns is a tuple of more than the output.
    for number, shape in enumerate(root.shapes):
        output = entry.source(outputs[number]) if outputs else root
        if output is not None and shape.bytes >= limit and (shape.dtype, shape.dims) not in known:
            known.add((shape.dtype, shape.dims))
            message = f"an output is {shape.bytes / gb:.1f} GB on one core"
            yield Finding("buffer-size", message, output.place, output.op_name)
    for instruction, _ in module.instructions():
        if instruction.opcode not in _WRITTEN_OUT:
            continue
        for shape in instruction.shapes:
            if shape.bytes >= limit and (shape.dtype, shape.dims) not in known:
                known.add((shape.dtype, shape.dims))
                message = f"{instruction.opcode} makes {shape}, {shape.bytes / gb:.1f} GB on one core"
                yield Finding("buffer-intermediate", message, instruction.place, instruction.op_name)


def _key(collective: Collective) -> object:
    """Tell one communicator from another: by who talks to whom."""
    return collective.pairs or frozenset(map(frozenset, collective.groups))


def _among(collective: Collective, mesh: jax.sharding.Mesh | None = None) -> str:
    axes = collective.axes(mesh) if mesh is not None else None
    if axes:
        return f"{', '.join(axes)} (groups of {collective.group_size})"
    groups = collective.pairs or collective.groups
    return f"{len(groups)} {'transfers' if collective.pairs else f'groups of {collective.group_size}'}"


def _finding(rule: str, message: str, collective: Collective, count: int = 1) -> Finding:
    return Finding(rule, message, collective.instruction.place, collective.instruction.op_name, count=count)


def _itemsize(dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype)).size * 4
    return dtype.itemsize
