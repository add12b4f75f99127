"""Analysis of what one core computes, moves and holds in a step, read from the compiled program.

The program is built on simulated devices. Where the data axis is longer than two, it is compiled with two replicas
(of the batch, too): a replica's matrix products, memory and collectives are those of every other, and only the groups
along `data` are longer. Where that is still too many devices, `fsdp` is shortened as well (see `lengthened`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from trainfw import backends
from trainfw.errors import UserError
from trainfw.hardware import Topology
from trainfw.hlo import (
    PRODUCTS,
    Computation,
    Instruction,
    Module,
    Partitioned,
    collectives_of,
    partition,
    product_sizes,
)
from trainfw.optim import traits_of
from trainfw.parallel import Layout
from trainfw.planning.read_step.op_names import is_backward, is_recomputed, is_within
from trainfw.recipe import Recipe
from trainfw.scopes import ATTENTION, LOSS, LOSS_GRADIENT

if TYPE_CHECKING:
    from trainfw.program import Program

REPLICAS = 2
"""Replicas that are compiled, of however many."""

Phase: TypeAlias = Literal["forward", "backward", "update"]
"""Phase of a step: `forward` (with the loss and its gradient) and `backward` (with what remat computes again) of every
microbatch, one after the other, then the `update`: sums of gradients over replicas, the norms and the optimizer."""
StreamedKind: TypeAlias = Literal["model", "attention", "update"]


@dataclass(frozen=True)
class Matmul:
    """A matrix product (batch, m, k) x (batch, k, n) on one core."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str
    """Dtype of the operands, as HLO names it; the wider where they differ."""
    times: int
    """Runs in a step."""
    mixed: bool = False
    """One operand is of a narrower dtype than the other."""
    bytes: int = 0
    """Bytes of both operands and the result, each time."""
    attention: bool = False
    """A product with the scores, S x S, which a fused kernel never writes to memory."""
    backward: bool = False
    """Computes a gradient, in whichever phase. (What remat computes again does not.)"""
    phase: Phase = "backward"

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k * self.times


@dataclass(frozen=True)
class Transfer:
    """A collective of a step."""

    kind: str
    """`all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`. An all-reduce of which each
    core keeps its own part is called the reduce-scatter that accelerators' compilers make of it."""
    axes: tuple[str, ...]
    """Mesh axes that it runs along."""
    dtype: str
    bytes: int
    """Bytes of the whole buffer, each time: what an all-gather returns, what a reduce-scatter takes."""
    times: int
    phase: Phase = "backward"


@dataclass(frozen=True)
class Streamed:
    """Device memory read and written in a step by other than matrix products and collectives, elementwise operations
    fused into what uses them."""

    kind: StreamedKind
    """`attention`: scores. `update`: what `jax.grad` does not differentiate: the optimizer, and sums of gradients."""
    bytes: float
    phase: Phase = "backward"
    array: int = 0
    """Bytes of the largest array that a kernel reads or writes, to the next power of two; 0 where nobody knows."""


_Of: TypeAlias = Literal["matmuls", "transfers", "streamed"]


@dataclass(frozen=True)
class Operation:
    """One operation in one turn of a loop: a part of what the analysis has added up."""

    of: _Of
    index: int
    share: float
    """Share of its time in a step."""


@dataclass(frozen=True)
class Loop:
    """One turn of a loop over layers."""

    phase: Phase
    times: int
    operations: tuple[Operation, ...]
    """Operations as the program lists them, each after what it needs; a compiler may choose another such order."""


@dataclass(frozen=True, repr=False)
class Analysis:
    """One core's step."""

    layout: Layout
    matmuls: tuple[Matmul, ...]
    transfers: tuple[Transfer, ...]
    streamed: tuple[Streamed, ...]
    loops: tuple[Loop, ...] = ()
    """The forward and the backward one over layers; none where these are unrolled."""
    unrecognised: tuple[str, ...] = ()
    """Names in `trainfw.scopes` of parts that were not found in the program, and so count as something else."""

    def __repr__(self) -> str:
        return f"<Analysis: {self.layout}, {self.flops:.3g} FLOPs a core, {len(self.transfers)} kinds of collectives>"

    @property
    def flops(self) -> float:
        return sum(matmul.flops for matmul in self.matmuls)

    def streamed_bytes(self, kind: StreamedKind | None = None) -> float:
        """Sum up what passes through memory, of one kind or of all."""
        return sum(streamed.bytes for streamed in self.streamed if kind in (None, streamed.kind))


def simulated_recipe(recipe: Recipe, layout: Layout, most: int = backends.MAX_SIMULATED) -> tuple[Recipe, Layout]:
    """The recipe and layout that are compiled in place of a larger one.

    At most `REPLICAS` along `data`, and where that is still more than `most` devices, a shorter `fsdp` too. Both
    axes share out the batch, so a core's rows, and with them its products and activations, stay as they are.
    """
    data = REPLICAS if layout.data % REPLICAS == 0 else layout.data
    fsdp = layout.fsdp
    while fsdp % 2 == 0 and fsdp > 2 and math.prod((layout.sizes | {"data": data, "fsdp": fsdp}).values()) > most:
        fsdp //= 2
    rows = recipe.train.global_batch_size * data * fsdp // (layout.data * layout.fsdp)
    sizes = layout.sizes | {"data": data, "fsdp": fsdp}
    parallel = recipe.parallel.model_copy(update=sizes)
    train = recipe.train.model_copy(update={"global_batch_size": rows})
    hardware = type(recipe.hardware)()
    return recipe.model_copy(update={"parallel": parallel, "train": train, "hardware": hardware}), Layout(**sizes)


@dataclass(frozen=True)
class Simulation:
    """Program that is compiled to plan a recipe."""

    layout: Layout
    recipe: Recipe
    """The one that is compiled, perhaps of a shorter layout."""
    simulated: Layout
    rules: str | None
    """Name of the backend whose restrictions hold on the hardware (see `Topology.rules`)."""
    stands_in: bool
    """True where this machine's CPU stands for other hardware, so that the program has no kernels of the CPU's own."""

    @property
    def cores(self) -> int:
        """Devices that a process must simulate."""
        return math.prod(self.simulated.sizes.values())


def simulation(recipe: Recipe, most: int = backends.MAX_SIMULATED) -> Simulation:
    """Choose what is compiled to plan `recipe` on its topology, for `most` devices at most.

    Raises UserError where the recipe names no topology, where its layout does not fit that, and where a program for
    fewer devices would not tell of it.
    """
    topology = recipe.hardware.load()
    if topology is None:
        raise recipe.error("hardware.topology", "a plan needs hardware to be for; see trainfw topology")
    check_rates(recipe, topology)
    with recipe.blamed("parallel"):
        layout = Layout.resolve(recipe.parallel, topology.cores)
    small, simulated = simulated_recipe(recipe, layout, most)
    found = Simulation(layout, small, simulated, topology.rules, not topology.is_cpu)
    if simulated != layout:
        if problem := layout.batch_problem(recipe.train.global_batch_size, recipe.train.accumulation_steps):
            raise recipe.error("train.global_batch_size", problem)
        if simulated.fsdp < layout.fsdp and traits_of(recipe.optimizer).whole_matrices:
            raise recipe.error(
                "optimizer.name",
                f"{layout} is compiled for fsdp({simulated.fsdp}), and an update of whole matrices "
                f"does not shrink in step; let data be longer and fsdp shorter, or take another optimizer",
            )
    if found.cores > backends.MAX_SIMULATED:
        raise recipe.error(
            "parallel",
            f"{layout} is compiled for {found.cores:,} cores, of {backends.MAX_SIMULATED:,} that can be simulated; "
            f"let data or fsdp be longer (fsdp by a power of two) and the other axes shorter",
        )
    return found


def simulated_cores(recipe: Recipe) -> int:
    """Devices that a process must simulate to plan `recipe`. Raises UserError as `simulation` does."""
    return simulation(recipe).cores


def check_rates(recipe: Recipe, topology: Topology) -> None:
    """Raise UserError where `topology` lacks a rate without which no step of `recipe` has a time."""
    missing = [f"chip.peak_flops.{recipe.train.compute_dtype}", "chip.hbm_bandwidth"]
    if missing := [key for key in missing if key not in topology.figures]:
        how = (
            "; measure this machine's with `python benchmarks/machine.py --hardware mine.yaml` and plan for "
            "hardware.topology=mine.yaml"
        )
        why = f"a plan needs rates, and no source gives its {' and '.join(missing)}{how * topology.is_cpu}"
        raise recipe.error("hardware.topology", why)


def simulated_program(found: Simulation) -> Program:
    """The program to compile, on devices of this process. Raises UserError where it has too few."""
    import jax

    from trainfw.program import build_program

    if found.cores > jax.device_count():
        raise UserError(
            f"planning {found.layout} compiles for {found.cores} devices, and this process has {jax.device_count()}: "
            f"call trainfw.simulate(devices={found.cores}) first, before anything uses jax"
        )
    return build_program(found.recipe, jax.devices()[: found.cores], stands_in=found.stands_in)


def compile_step(program: Program, progress: Callable[[str], None] = lambda _: None) -> Partitioned:
    progress(f"compiling the step for {program.mesh.size} cores")
    lowered = program.functions["train"].lower()
    return partition(lowered, backends.current().compiler_options)


def lengthened(analysis: Analysis, simulated: Layout, layout: Layout) -> Analysis:
    """The analysis of a program compiled for `simulated`, at the full length of `layout`.

    Along `data` nothing changes but the groups. Along `fsdp` whole weights are gathered and whole gradients scattered,
    however many devices share them. What each does with its own share shrinks: the update, and the sums of gradients
    over replicas, which are of that share. (So does the cast of weights before they are gathered, of little weight,
    which is left as it is.)
    """
    share = simulated.fsdp / layout.fsdp
    analysis = replace(analysis, layout=layout)
    if share == 1:
        return analysis

    def of_share(transfer: Transfer) -> bool:
        # What is not shared, such as scales of norms, is summed over fsdp as well; scalars are the norms of gradients.
        return transfer.phase == "update" and transfer.bytes > 8 and set(transfer.axes) <= {"pipeline", "data"}

    transfers = tuple(replace(t, bytes=round(t.bytes * share)) if of_share(t) else t for t in analysis.transfers)
    streamed = tuple(replace(s, bytes=s.bytes * share) if s.kind == "update" else s for s in analysis.streamed)
    return replace(analysis, transfers=transfers, streamed=streamed)


def read(module: Module, mesh: object, layout: Layout) -> Analysis:
    """The analysis of a partitioned module on `mesh`.

    Where nothing in it is differentiated, all of it is the model's: there is no optimizer.
    """
    computations = [module.computations[name] for name in module.times]
    products = [
        _product(c, one, "forward") for c in computations for one in c.instructions.values() if one.opcode in PRODUCTS
    ]
    scores = _scores(module, products)
    trains = any("jvp(" in instruction.op_name for instruction, _ in module.instructions())
    collectives = {collective.instruction.name: collective for collective in collectives_of(module)}
    work: dict[str, list[tuple[_Work, int]]] = {}
    totals: Counter[_Work] = Counter()
    for name, times in module.times.items():
        computation = module.computations[name]
        phases = _phases(computation, repeated=times > 1)
        work[name] = []
        for instruction in computation.instructions.values():
            phase = phases[instruction.name]
            if instruction.opcode in PRODUCTS:
                work[name].append((_product(computation, instruction, phase), 1))
            elif instruction.name in collectives:
                found = collectives[instruction.name]
                kind = "reduce-scatter" if found.kind == "all-reduce" and found.scattered else found.kind
                # Some groups are parts of an axis, such as of cores that share a head of keys and values.
                axes = found.axes(mesh) or found.spanned(mesh)
                work[name].append((Transfer(kind, axes, found.dtype, found.bytes, 1, phase), 1))
            else:
                sizes, largest = _streamed(computation, instruction, scores, trains=trains)
                array = 1 << (largest - 1).bit_length() if largest else 0
                work[name] += [(Streamed(kind, 0, phase, array), size) for kind, size in sizes.items()]
        for piece, amount in work[name]:
            totals[piece] += amount * times
    matmuls = {piece: n for piece, n in totals.items() if isinstance(piece, Matmul)}
    transfers = {piece: n for piece, n in totals.items() if isinstance(piece, Transfer)}
    streamed = {piece: size for piece, size in totals.items() if isinstance(piece, Streamed)}
    index = {piece: i for kind in (matmuls, transfers, streamed) for i, piece in enumerate(kind)}
    loops = (
        Loop(
            phase,
            module.times[name],
            tuple(Operation(_OF[type(piece)], index[piece], amount / totals[piece]) for piece, amount in work[name]),
        )
        for phase, name in _loops(module, work).items()
    )
    in_loss = any(is_within(instruction.op_name, LOSS) for instruction, _ in module.instructions())
    return Analysis(
        layout=layout,
        matmuls=tuple(replace(matmul, times=times) for matmul, times in matmuls.items()),
        transfers=tuple(replace(transfer, times=times) for transfer, times in transfers.items()),
        streamed=tuple(replace(piece, bytes=float(size)) for piece, size in streamed.items()),
        loops=tuple(loops),
        # Without these scopes a part of the program is taken for something else.
        unrecognised=(*[ATTENTION] * (not scores), *[LOSS] * (not in_loss)),
    )


_Work: TypeAlias = Matmul | Transfer | Streamed
_OF: dict[type, _Of] = {Matmul: "matmuls", Transfer: "transfers", Streamed: "streamed"}


def _scores(module: Module, products: Sequence[Matmul]) -> set[int]:
    """Numbers of elements that arrays of attention's scores have on a device.

    Of a product's three arrays that is the one whose exponentials are taken; where none is (a kernel takes them), the
    largest: short rows have fewer scores than queries.
    """
    exponentials = {
        math.prod(instruction.shapes[0].dims)
        for instruction, _ in module.instructions()
        if instruction.opcode == "exponential" and is_within(instruction.op_name, ATTENTION)
    }
    arrays = [{p.batch * size for size in (p.m * p.k, p.n * p.k, p.m * p.n)} for p in products if p.attention]
    return {size for sizes in arrays for size in (sizes & exponentials or {max(sizes)})}


def _phases(computation: Computation, *, repeated: bool) -> dict[str, Phase]:
    """The phase of every instruction of a computation, which runs more than once in a step or not."""

    def named(instruction: Instruction) -> Phase | None:
        if is_backward(instruction.op_name) or is_recomputed(instruction.op_name):
            return "backward"
        return "forward" if "jvp(" in instruction.op_name else None

    found = {instruction.name: named(instruction) for instruction in computation.instructions.values()}
    present = set(found.values()) - {None}
    # What has no such name: in a loop over microbatches sums of gradients, in one over layers what the partitioner
    # added, else the update; but for the zeros and masks that forward and backward start from.
    rest: Phase = "update" if not repeated or not present else "backward" if "backward" in present else "forward"
    zeros: Phase = "forward" if "forward" in present else rest
    return {
        name: phase or (zeros if computation.instructions[name].opcode == "broadcast" else rest)
        for name, phase in found.items()
    }


def _loops(module: Module, work: Mapping[str, Sequence[tuple[_Work, int]]]) -> dict[Phase, str]:
    """Find the loop over layers, forward and backward.

    That is the one with the most products among those that run more than once, in one phase alone, and call no other.
    """
    most: dict[Phase, tuple[float, str]] = {}
    for name, pieces in work.items():
        phases = {piece.phase for piece, _ in pieces}
        flops = module.times[name] * sum(piece.flops for piece, _ in pieces if isinstance(piece, Matmul))
        opcodes = {instruction.opcode for instruction in module.computations[name].instructions.values()}
        if module.times[name] == 1 or len(phases) != 1 or not flops or opcodes & {"while", "call", "conditional"}:
            continue
        if any(is_within(i.op_name, LOSS) for i in module.computations[name].instructions.values()):
            continue  # over chunks of the loss
        phase = phases.pop()
        if phase != "update" and flops > most.get(phase, (0.0, ""))[0]:
            most[phase] = flops, name
    return {phase: most[phase][1] for phase in ("forward", "backward") if phase in most}


def _product(computation: Computation, instruction: Instruction, phase: Phase) -> Matmul:
    """The matrix product that a `dot` is, or that a convolution is of its patches."""
    left, right = computation.operand_shapes(instruction)
    batch, m, n, k = product_sizes(instruction, left, right)
    op_name = instruction.op_name
    wider = max(left, right, key=lambda shape: shape.bytes / max(1, math.prod(shape.dims)))
    return Matmul(
        batch=batch,
        m=m,
        n=n,
        k=k,
        dtype=wider.dtype,
        times=1,
        mixed=left.dtype != right.dtype,
        bytes=left.bytes + right.bytes + instruction.bytes,
        # A sum of each row, which XLA's CPU backend takes as a product, has no scores.
        attention=m * n > 1 and is_within(op_name, ATTENTION),
        backward=is_within(op_name, LOSS_GRADIENT) or (is_backward(op_name) and not is_recomputed(op_name)),
        phase=phase,
    )


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "while", "call", "conditional", "bitcast", "after-all"),
    *("opt-barrier", "partition-id"),
}
_FUSED = {
    *("abs", "add", "and", "broadcast", "ceil", "clamp", "compare", "convert", "copy", "cosine", "divide", "erf"),
    *("exponential", "exponential-minus-one", "floor", "iota", "is-finite", "log", "log-plus-one", "logistic"),
    *("maximum", "minimum", "multiply", "negate", "not", "or", "power", "reduce-precision", "remainder", "reshape"),
    *("round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-logical", "sign"),
    *("sine", "slice", "sqrt", "subtract", "tan", "tanh", "transpose", "xor", "dynamic-slice", "pad", "concatenate"),
}
"""Operations that compilers fuse into what uses their results."""
_SLICES = {"slice", "dynamic-slice"}
_SAME = {"copy", "reshape"}
"""Operations among these that leave memory as it is."""
_ELSEWHERE = {*PRODUCTS, "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
"""Counted as matrix products and transfers."""


def _streamed(
    computation: Computation, instruction: Instruction, scores: set[int], *, trains: bool
) -> tuple[Counter[StreamedKind], int]:
    """Bytes that the kernel which ends with an instruction reads and writes, once, by kind, and those of its largest
    array; none where none does.

    A kernel is an operation that is not fused, or a fused one whose result something not fused takes (reductions take
    elementwise results as they come). It writes its result, and reads what it reaches through fused operations.

    Arrays of as many elements as `scores` has are attention's.
    """
    found: Counter[StreamedKind] = Counter()
    if instruction.opcode in _FREE | _ELSEWHERE or not _written(computation, instruction, trains):
        return found, 0
    # Forward and backward are under jax.grad, but for the zeros that they start from.
    of_model = _of_model(instruction, trains) or instruction.opcode == "broadcast"
    whole: StreamedKind = "model" if of_model else "update"
    if instruction.opcode == "dynamic-update-slice":  # in place
        part = computation.instructions[instruction.operands[1].partition("#")[0]].bytes
        found[whole] = 2 * part
        return found, part
    arrays = [instruction, *(computation.instructions[name] for name in _reads(computation, instruction, trains))]
    for array in arrays:
        of_scores = len(array.shapes) == 1 and math.prod(array.shapes[0].dims) in scores
        found["attention" if of_scores and whole == "model" else whole] += array.bytes
    return found, max(array.bytes for array in arrays)


def _of_model(instruction: Instruction, trains: bool) -> bool:
    return not trains or "jvp(" in instruction.op_name


def _written(computation: Computation, instruction: Instruction, trains: bool) -> bool:
    if instruction.opcode not in _FUSED:
        return True
    if instruction.opcode in _SAME and not instruction.is_root:
        source = instruction
        while source.opcode in _SAME:
            source = computation.instructions[source.operands[0].partition("#")[0]]
        # Nothing is left to do; a slice of whole rows, such as a layer of a stack, is read where it lies.
        if source.opcode in _SLICES or _written(computation, source, trains):
            return False
    users = computation.users.get(instruction.name, ())
    # The optimizer is one kernel for each array, whatever uses its parts.
    if len(users) > 1 and _of_model(instruction, trains) and _joins(computation, instruction):
        return True
    return instruction.is_root or any(user.opcode not in _FUSED and user.opcode != "reduce" for user in users)


def _joins(computation: Computation, instruction: Instruction) -> bool:
    """Tell whether it combines arrays of its own size, such as the residual stream with what a block adds to it.

    Recomputing that in every kernel that reads it would reach back through all layers.
    """
    while True:
        operands = [computation.instructions[name.partition("#")[0]] for name in instruction.operands]
        arrays = [operand for operand in operands if operand.opcode not in ("broadcast", "constant", "iota")]
        if len(arrays) != 1:
            return len(arrays) > 1
        if arrays[0].opcode not in _FUSED or len(computation.users.get(arrays[0].name, ())) > 1:
            return False
        instruction = arrays[0]


def _reads(computation: Computation, instruction: Instruction, trains: bool) -> set[str]:
    """Names of the written values (and inputs) that a kernel reads; of a slice, the slice."""
    found: set[str] = set()
    seen: set[str] = set()
    pending = list(instruction.operands)
    while pending:
        name = pending.pop().partition("#")[0]
        if name in seen:
            continue
        seen.add(name)
        operand = computation.instructions[name]
        if operand.opcode in ("constant", "iota"):
            continue
        if operand.opcode in _SLICES or _written(computation, operand, trains):
            found.add(name)
        else:
            pending.extend(operand.operands)
    return found
