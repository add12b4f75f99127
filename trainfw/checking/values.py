"""Integers of StableHLO that are known when compiling: values of scalars, and ranges of arrays of indices."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxlib.mlir import ir

_FOLDED: dict[str, Callable[..., int]] = {
    "stablehlo.add": operator.add,
    "stablehlo.subtract": operator.sub,
    "stablehlo.multiply": operator.mul,
    "stablehlo.and": operator.and_,
    "stablehlo.or": operator.or_,
    "stablehlo.minimum": min,
    "stablehlo.maximum": max,
    "stablehlo.clamp": lambda low, value, high: min(max(low, value), high),
}
"""Arithmetic of integer scalars; bounds of loops do not come near an overflow."""
_SAME = {
    *("stablehlo.reshape", "stablehlo.broadcast_in_dim", "stablehlo.convert", "stablehlo.transpose"),
    *("stablehlo.reverse", "stablehlo.optimization_barrier"),
}
"""Operations whose results hold what their operands hold, and nothing else."""
_MONOTONE = {"stablehlo.add", "stablehlo.subtract", "stablehlo.multiply", "stablehlo.minimum", "stablehlo.maximum"}
"""Operations that, with a constant on one side, take the ends of a range to the ends of a range."""
_MOST_ELEMENTS = 2**16
"""Elements of a constant that is looked through, at most."""


@dataclass(frozen=True)
class Range:
    """The least and the greatest element of an array, both of which it has."""

    low: int
    high: int
    counted: bool
    """True where it comes out of an iota."""


class Arguments(NamedTuple):
    """Values that a function is called with, as far as they are known when compiling."""

    integers: tuple[int | None, ...] = ()
    ranges: tuple[Range | None, ...] = ()


def arguments_of(operands: Sequence[Any], arguments: Arguments) -> Arguments:
    """List the known values of operands, for the function that is called with them; `arguments` are the caller's."""
    return Arguments(
        tuple(integer_of(operand, arguments) for operand in operands),
        tuple(range_of(operand, arguments) for operand in operands),
    )


def forget() -> None:
    """Let go of the modules that were read."""
    integer_of.cache_clear()
    range_of.cache_clear()


@functools.cache  # a value may be reached in many ways
def integer_of(value: Any, arguments: Arguments) -> int | None:
    """Compute the value of an integer scalar in a function called with `arguments`; None where it is not known."""
    if getattr(value.type, "rank", 0):
        return None
    op = owner_of(value)
    if op is None:
        owner, number = value.owner.owner.operation, value.arg_number
        if owner.name == "func.func":
            return arguments.integers[number] if number < len(arguments.integers) else None
        if owner.name == "stablehlo.while" and number == argument_of(
            terminator(owner.regions[1]).operands[number], owner.regions[1]
        ):
            return integer_of(owner.operands[number], arguments)  # carried unchanged
        return None
    if op.name == "stablehlo.constant":
        try:
            return int(ir.DenseIntElementsAttr(op.attributes["value"])[0])
        except ValueError:
            return None
    if op.name in ("stablehlo.convert", "stablehlo.reshape", "stablehlo.optimization_barrier"):
        return integer_of(op.operands[list(op.results).index(value)], arguments)
    if op.name in _FOLDED:
        values = [integer_of(operand, arguments) for operand in op.operands]
        return None if None in values else _FOLDED[op.name](*values)
    if op.name == "func.call":  # jnp.clip, say, is a function of its own
        return integer_of(_returned(op, value), arguments_of(op.operands, arguments))
    if op.name == "stablehlo.case" and (index := integer_of(op.operands[0], arguments)) is not None:
        # How lax.platform_dependent says which platform it is compiled for.
        branch = op.regions[min(max(index, 0), len(op.regions) - 1)]
        return integer_of(terminator(branch).operands[0], arguments)
    return None


@functools.cache
def range_of(value: Any, arguments: Arguments) -> Range | None:
    """Find the range of an array of integers (or booleans), as `integer_of`; None where it is not known exactly."""
    if not isinstance(getattr(value.type, "element_type", None), ir.IntegerType):
        return None
    if not value.type.has_static_shape or 0 in value.type.shape:
        return None
    op = owner_of(value)
    if op is None:
        number = value.arg_number
        inside = value.owner.owner.operation.name == "func.func"
        return arguments.ranges[number] if inside and number < len(arguments.ranges) else None
    if op.name == "stablehlo.constant":
        return _constant_range(op)
    if op.name == "stablehlo.iota":
        return Range(0, value.type.shape[ir.IntegerAttr(op.attributes["iota_dimension"]).value] - 1, True)
    if op.name in _SAME:
        return range_of(op.operands[list(op.results).index(value)], arguments)
    if op.name == "func.call":
        return range_of(_returned(op, value), arguments_of(op.operands, arguments))
    if op.name == "stablehlo.select":
        chosen = range_of(op.operands[0], arguments)
        if chosen is None or chosen.low != chosen.high:
            return None
        return range_of(op.operands[1 if chosen.low else 2], arguments)
    ranges = [range_of(operand, arguments) for operand in op.operands]
    known = [found for found in ranges if found is not None]
    return _computed(op, known) if known and len(known) == len(ranges) else None


def _computed(op: Any, ranges: list[Range]) -> Range | None:
    counted = any(each.counted for each in ranges)
    if op.name == "stablehlo.compare":
        holds = _compared(str(op.attributes["comparison_direction"]).split()[-1].rstrip(">"), *ranges)
        return None if holds is None else Range(holds, holds, counted)
    if op.name == "stablehlo.clamp":
        low, value, high = ranges
        if low.low != low.high or high.low != high.high:
            return None
        ends = [min(max(low.low, end), high.low) for end in (value.low, value.high)]
    elif op.name in _MONOTONE and any(each.low == each.high for each in ranges):
        left, right = ranges
        ends = [_FOLDED[op.name](a, b) for a in {left.low, left.high} for b in {right.low, right.high}]
    else:
        return None
    return Range(min(ends), max(ends), counted)


def _compared(direction: str, left: Range, right: Range) -> bool | None:
    """Compare where the result is the same for all elements; None where it is not."""
    if direction in ("GT", "LE"):
        left, right = right, left
    below = True if left.high < right.low else False if left.low >= right.high else None
    if below is None or direction not in ("LT", "GT", "LE", "GE"):
        return None
    return below if direction in ("LT", "GT") else not below


def _constant_range(op: Any) -> Range | None:
    try:
        elements = ir.DenseIntElementsAttr(op.attributes["value"])
    except ValueError:
        return None
    if elements.is_splat:
        number = int(elements[0])
        return Range(number, number, False)
    if len(elements) > _MOST_ELEMENTS:
        return None
    numbers = [int(elements[i]) for i in range(len(elements))]
    return Range(min(numbers), max(numbers), False)


def owner_of(value: Any) -> Any | None:
    """Find the operation that makes a value; None for an argument of a block."""
    owner = value.owner
    return owner.operation if hasattr(owner, "operation") else None


def terminator(region: Any) -> Any:
    *_, last = region.blocks[0].operations
    return last.operation


def argument_of(value: Any, region: Any) -> int | None:
    """Find which argument of a region's block a value is; None for none."""
    return next((number for number, own in enumerate(region.blocks[0].arguments) if own == value), None)


def _returned(call: Any, value: Any) -> Any:
    """Find what a called function returns as this result of the call."""
    module = call
    while module.parent is not None:
        module = module.parent.operation
    name = str(call.attributes["callee"]).lstrip("@").strip('"')
    function = ir.SymbolTable(module)[name].operation
    return terminator(function.regions[0]).operands[list(call.results).index(value)]
