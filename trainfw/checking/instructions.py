"""The rule on a program's number of instructions, of which neuronx-cc takes so many.

An estimate: a product is cut into tiles of the tensor engine, all else, chains of operations as one, into tiles of as
many elements as a bank of PSUM holds, and each tile takes one instruction. Loads, stores and what the compiler spills
come on top: it is a low one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainfw.checking.report import Finding
from trainfw.hardware import Topology
from trainfw.hlo import PRODUCTS, Computation, Instruction, Module, product_sizes

LIMIT = 5_000_000
"""Instructions of a program beyond which neuronx-cc refuses it by default (see rule `instructions`)."""

_NONE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "while", "call", "fusion", "conditional", "bitcast"),
    *("after-all", "opt-barrier", "partition-id", "replica-id", "reshape", "broadcast", "iota", "slice"),
    *("copy", "dynamic-slice", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
}
"""Opcodes that no compute engine works on, or only as part of what takes their result."""


def read_instructions(module: Module, topology: Topology, *, unrolled: bool) -> Iterator[Finding]:
    """Report a program that has, or nearly has, more instructions than the compiler takes.

    Args:
        unrolled: loops are counted turn by turn, as where the program that runs has its layers unrolled; else once.
    """
    once, turns = count_instructions(module, topology)
    count = turns if unrolled else once
    if count <= LIMIT / 2:
        return
    loops = f" ({_rounded(turns):,} with loops unrolled)" if turns > once and not unrolled else ""
    message = f"some {_rounded(count):,} instructions{loops} on one core, by tiles; neuronx-cc takes {LIMIT:,}"
    yield Finding("instructions" if count > LIMIT else "instructions-near", message)


def count_instructions(module: Module, topology: Topology) -> tuple[int, int]:
    """Estimate the instructions of a module on one core: (bodies of loops once, turn by turn)."""
    once = turns = 0
    for name, times in module.times.items():
        computation = module.computations[name]
        found = sum(_tiles(computation, one, topology) for one in computation.instructions.values())
        once, turns = once + found, turns + found * times
    return once, turns


def _tiles(computation: Computation, instruction: Instruction, topology: Topology) -> int:
    engine = topology.chip.tensor_engine
    if engine is None or instruction.opcode in _NONE:
        return 0
    operands = computation.operand_shapes(instruction)
    if instruction.opcode not in PRODUCTS:
        if _goes_on(computation, instruction):
            return 0
        in_place = instruction.opcode == "dynamic-update-slice"
        written = operands[1:2] if in_place else instruction.shapes
        return sum(-(-math.prod(shape.dims) // (engine.rows * engine.moving)) for shape in written)
    batch, m, n, k = product_sizes(instruction, *operands)
    # Either operand may stay in the engine, while the other moves through it.
    across = min(-(-stays // engine.columns) * -(-moves // engine.moving) for stays, moves in ((m, n), (n, m)))
    return batch * -(-k // engine.rows) * across


def _goes_on(computation: Computation, instruction: Instruction) -> bool:
    """Tell whether a result goes into one more operation of its size alone, which an engine can do in the same pass."""
    users = computation.users.get(instruction.name, ())
    return len(users) == 1 and (
        users[0].opcode not in PRODUCTS | _NONE and users[0].shapes[0].dims == instruction.shapes[0].dims
    )


def _rounded(count: int) -> int:
    """Round to two digits."""
    digits = max(len(str(count)) - 2, 0)
    return round(count, -digits)
