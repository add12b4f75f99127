"""What one core computes, moves and holds in a step, read from the compiled program.

The program is built on simulated devices. Where the data axis is longer than two, it is compiled with two replicas
(of the batch, too): a replica's matrix products, memory and collectives are those of every other, and only the groups
along `data` are longer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainfw import backends
from trainfw.errors import UserError
from trainfw.hlo import Computation, Instruction, Module, Partitioned, collectives_of, partition
from trainfw.parallel import AXES, Layout
from trainfw.recipe import Recipe

if TYPE_CHECKING:
    from trainfw.program import Program

REPLICAS = 2
"""Replicas that are compiled, of however many."""


@dataclass(frozen=True)
class Matmul:
    """A matrix product (batch, m, k) x (batch, k, n) on one core."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str
    """Of the operands, as HLO names it."""
    times: int
    """In a step."""

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
    """Of the whole buffer, each time: what an all-gather returns, what a reduce-scatter takes."""
    times: int


@dataclass(frozen=True)
class Analysis:
    """One core's step."""

    layout: Layout
    matmuls: tuple[Matmul, ...]
    transfers: tuple[Transfer, ...]
    streamed_bytes: float
    """Device memory read and written in a step by all else than matrix products and collectives, elementwise
    operations fused into what uses them."""

    @property
    def flops(self) -> float:
        return sum(matmul.flops for matmul in self.matmuls)


def simulated_recipe(recipe: Recipe, layout: Layout) -> tuple[Recipe, Layout]:
    """The recipe and layout that are compiled in place of a larger one: at most `REPLICAS` along `data`."""
    data = math.gcd(layout.data, REPLICAS) if layout.data > 1 else 1
    data = data if data > 1 else layout.data
    rows = recipe.train.global_batch_size * data // layout.data
    sizes = layout.sizes | {"data": data}
    parallel = recipe.parallel.model_copy(update=sizes)
    train = recipe.train.model_copy(update={"global_batch_size": rows})
    hardware = type(recipe.hardware)()
    return recipe.model_copy(update={"parallel": parallel, "train": train, "hardware": hardware}), Layout(**sizes)


def analyse(recipe: Recipe, progress: Callable[[str], None] = lambda _: None) -> tuple[Analysis, Program, Partitioned]:
    """Compile the training step of `recipe` for its topology on simulated devices, which this process must have.

    Returns the analysis at full size, with the (perhaps shortened) program and its compilation. Raises UserError
    where the recipe names no topology, or one too large to simulate.
    """
    import jax

    from trainfw.program import build_program

    topology = recipe.hardware.load()
    if topology is None:
        raise recipe.error("hardware.topology", "a plan needs hardware")
    with recipe.blamed("parallel"):
        layout = Layout.resolve(recipe.parallel, topology.cores)
    small, simulated = simulated_recipe(recipe, layout)
    needed = math.prod(simulated.sizes.values())
    if needed > jax.device_count():
        raise UserError(f"planning {layout} compiles for {needed} devices, and this process has {jax.device_count()}")
    program = build_program(small, jax.devices()[:needed])
    progress(f"compiling the step for {needed} cores")
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    partitioned = partition(lowered, backends.current().compiler_options)
    return read(partitioned.module, program.mesh, layout), program, partitioned


def read(module: Module, mesh: object, layout: Layout) -> Analysis:
    """The analysis of a partitioned module on `mesh`."""
    matmuls: Counter[tuple[int, int, int, int, str]] = Counter()
    for name, times in module.times.items():
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "dot":
                matmuls[_matmul(computation, instruction)] += times
    transfers: Counter[tuple[str, tuple[str, ...], str, int]] = Counter()
    for collective in collectives_of(module):
        scattered = collective.kind == "all-reduce" and collective.scattered
        kind = "reduce-scatter" if scattered else collective.kind
        axes = collective.axes(mesh) or tuple(axis for axis in AXES if layout.sizes[axis] > 1)
        transfers[kind, axes, collective.dtype, collective.bytes] += collective.times
    return Analysis(
        layout=layout,
        matmuls=tuple(Matmul(*key, times) for key, times in matmuls.items()),
        transfers=tuple(Transfer(*key, times) for key, times in transfers.items()),
        streamed_bytes=float(sum(_streamed(module.computations[name]) * times for name, times in module.times.items())),
    )


def _matmul(computation: Computation, dot: Instruction) -> tuple[int, int, int, int, str]:
    left, right = (computation.instructions[operand].shapes[0] for operand in dot.operands)

    def size(shape: tuple[int, ...], key: str) -> int:
        dims = dot.attributes.get(key, "{}").strip("{}")
        return math.prod(shape[int(dim)] for dim in dims.split(",") if dim)

    batch, k = size(left.dims, "lhs_batch_dims"), size(left.dims, "lhs_contracting_dims")
    m, n = math.prod(left.dims) // (batch * k), math.prod(right.dims) // (batch * k)
    return batch, m, n, k, left.dtype


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "while", "call", "conditional", "bitcast", "after-all"}
_FUSED = {
    *("abs", "add", "and", "broadcast", "ceil", "clamp", "compare", "convert", "copy", "cosine", "divide", "erf"),
    *("exponential", "exponential-minus-one", "floor", "iota", "is-finite", "log", "log-plus-one", "logistic"),
    *("maximum", "minimum", "multiply", "negate", "not", "or", "power", "reduce-precision", "remainder", "reshape"),
    *("round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-logical", "sign"),
    *("sine", "slice", "sqrt", "subtract", "tan", "tanh", "transpose", "xor", "dynamic-slice", "pad", "concatenate"),
}
"""Operations that compilers fuse into what uses their results."""
_ELSEWHERE = {"dot", "convolution", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
"""Counted as matrix products and transfers."""


def _streamed(computation: Computation) -> int:
    """Bytes that the kernels of one computation read and write, once.

    A kernel is an operation that is not fused, or a fused one whose result something not fused takes (reductions take
    elementwise results as they come). It writes its result, and reads what it reaches through fused operations.
    """
    total = 0
    for instruction in computation.instructions.values():
        if instruction.opcode in _FREE or instruction.opcode in _ELSEWHERE or not _written(computation, instruction):
            continue
        if instruction.opcode == "dynamic-update-slice":  # in place
            total += 2 * _shape_bytes(computation, instruction.operands[1])
            continue
        total += instruction.bytes + sum(_shape_bytes(computation, name) for name in _reads(computation, instruction))
    return total


def _written(computation: Computation, instruction: Instruction) -> bool:
    if instruction.opcode not in _FUSED:
        return True
    users = computation.users.get(instruction.name, ())
    return instruction.is_root or any(user.opcode not in _FUSED and user.opcode != "reduce" for user in users)


def _reads(computation: Computation, instruction: Instruction) -> set[str]:
    """Names of the written values (and inputs) that a kernel reads; of a slice, the slice."""
    found: set[str] = set()
    seen: set[str] = set()
    pending = list(instruction.operands)
    while pending:
        name = pending.pop().partition("#")[0]
        operand = computation.instructions.get(name)
        if operand is None or name in seen:
            continue
        seen.add(name)
        if operand.opcode in ("constant", "iota"):
            continue
        if (
            operand.opcode in ("slice", "dynamic-slice")
            or operand.opcode not in _FUSED
            or _written(computation, operand)
        ):
            found.add(name)
        else:
            pending.extend(operand.operands)
    return found


def _shape_bytes(computation: Computation, name: str) -> int:
    operand = computation.instructions.get(name.partition("#")[0])
    return 0 if operand is None else operand.bytes
