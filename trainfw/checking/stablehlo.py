"""What Neuron would be given: rules on the operations of a StableHLO module."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from trainfw.checking.report import Finding
from trainfw.checking.rules import known_custom_calls, known_operators
from trainfw.hlo import Place, count_trips, user_place

_COMPARISONS = ("LT", "LE", "GT", "GE")
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
Arguments = tuple[int | None, ...]
"""What a function is called with, where that is an integer known when compiling."""


def read_stablehlo(module: Any) -> list[Finding]:
    """Findings in a module as `lowered.compiler_ir("stablehlo")` gives it."""
    functions = {str(op.attributes["sym_name"]).strip('"'): op.operation for op in _functions(module)}
    findings: list[Finding] = []
    seen: set[Any] = set()

    def visit(name: str, caller: Place | None, calling: str, arguments: Arguments) -> None:
        if (name, caller, calling, arguments) in seen or name not in functions:
            return
        seen.add((name, caller, calling, arguments))
        walk(functions[name], caller, calling, arguments)

    def walk(parent: Any, caller: Place | None, calling: str, arguments: Arguments) -> None:
        for op in _inside(parent):
            frames, op_name = _location(op.location)
            # JAX's own jitted functions are compiled apart, without lines: theirs is the caller's.
            own = user_place(frames)
            place, origin = (own, op_name.rpartition("/")[2].rstrip(":")) if own else (caller, calling)
            if op.name == "func.call":
                known = tuple(_integer(operand, arguments) for operand in op.operands)
                visit(str(op.attributes["callee"]).lstrip("@").strip('"'), place, origin, known)
                continue
            findings.extend(
                Finding(rule, message, place, op_name, origin=origin) for rule, message in _read(op, arguments)
            )
            walk(op, place, origin, arguments)

    visit("main", None, "", ())
    _integer.cache_clear()  # which keeps the module
    return findings


def _functions(module: Any) -> Iterator[Any]:
    return (op for op in module.body.operations if op.operation.name == "func.func")


def _inside(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation


def _location(location: Any) -> tuple[list[Place], str]:
    """The stack frames of an operation, innermost first, and its name."""
    frames: list[Place] = []
    name = ""
    left = [location]
    while left:
        at = left.pop()
        if hasattr(at, "callee"):
            left += [at.caller, at.callee]
        elif hasattr(at, "name_str"):
            name = name or at.name_str
            left.append(at.child_loc)
        elif hasattr(at, "filename"):
            frames.append(Place(at.filename, at.start_line))
        elif hasattr(at, "locations"):
            left += reversed(list(at.locations))
    return frames, name


def _read(op: Any, arguments: Arguments) -> Iterator[tuple[str, str]]:
    dialect, _, name = op.name.partition(".")
    if not all(_is_static(value.type) for value in (*op.operands, *op.results)):
        yield "shape-dynamic", f"{name} of a dynamic shape"
    if dialect == "chlo":  # decomposed into stablehlo, all but these
        if name == "top_k" and _is_integer(op.operands[0]):
            yield "topk-integer", f"top_k of {_type(op.operands[0])}"
        elif name == "ragged_dot":
            yield "op-unlisted", f"{op.name} of {_type(op.operands[0])}"
    if dialect != "stablehlo":
        return
    match name:
        case "case" | "if" if len(op.regions) > 1 and _integer(op.operands[0], arguments) is None:
            yield "control-cond", f"a conditional of {len(op.regions)} branches"
        case "while" if _trip_count(op, arguments) is None:
            yield "control-while", "a while loop whose trip count is not known when compiling"
        case "rng_bit_generator" if "DEFAULT" not in str(op.attributes["rng_algorithm"]):
            yield "rng-algorithm", f"rng_bit_generator with {op.attributes['rng_algorithm']}"
        case "sort" if not _sorts_simply(op):
            yield "sort-comparator", f"a sort of {_type(op.operands[0])} whose comparator is not one comparison"
        case "reduce" | "reduce_window" if len(op.operands) > 2:
            yield "reduce-variadic", f"reduces {len(op.operands) // 2} arrays at once ({_type(op.operands[0])}, ...)"
        case "dot_general" | "dot" if _is_integer(op.operands[0]) or _is_integer(op.operands[1]):
            yield "dot-integer", f"multiplies {_type(op.operands[0])} and {_type(op.operands[1])}"
        case "scatter" if _is_integer(op.operands[0]) and _adds(op):
            yield "scatter-integer", f"adds into {_type(op.operands[0])}"
        case "convolution":
            stride, dilation, kernel = (_large(op, key) for key in ("window_strides", "lhs_dilation", "rhs_dilation"))
            if dilation and kernel:
                yield "conv-dilation", f"input dilation {dilation} with kernel dilation {kernel}"
            if dilation and stride:
                yield "conv-stride-dilation", f"stride {stride} with input dilation {dilation}"
        case "triangular_solve":
            yield "op-triangular-solve", f"triangular_solve of {_type(op.operands[0])}"
        case "reduce_precision":
            rule = "op-reduce-precision" if _reduces(op) else "op-reduce-precision-noop"
            yield rule, f"reduce_precision of {_type(op.operands[0])}"
        case "power" if not _is_known_power(op):
            yield "op-pow", f"raises {_type(op.operands[0])} to a power that is no constant integer"
        case "custom_call":
            target = str(op.attributes["call_target_name"]).strip('"')
            if target not in known_custom_calls() and not target.startswith("xla.sdy."):
                yield "custom-call", f"calls {target}"
    if name == "reduce_window" and (dilation := _large(op, "base_dilations") or _large(op, "window_dilations")):
        yield "reduce-window-dilation", f"reduce_window with dilation {dilation}"
    is_complex = any("complex" in _type(value) for value in (*op.operands, *op.results))
    if name not in known_operators() and not is_complex:  # which is refused as such
        yield "op-unlisted", f"{op.name} of {_type(op.operands[0]) if len(op.operands) else 'nothing'}"


# --- Operations ----------------------------------------------------------------------------------


def _reduces(op: Any) -> bool:
    """Whether a reduce_precision has fewer bits than the dtype it is of."""
    kept = int(op.attributes["exponent_bits"]), int(op.attributes["mantissa_bits"])
    whole = {"f64": (11, 52), "f32": (8, 23), "bf16": (8, 7), "f16": (5, 10)}
    return kept != whole.get(_type(op.operands[0]).rpartition("x")[2])


def _terminator(region: Any) -> Any:
    *_, last = region.blocks[0].operations
    return last.operation


def _sorts_simply(op: Any) -> bool:
    decision = _owner(_terminator(op.regions[0]).operands[0])
    return (
        decision is not None
        and decision.name == "stablehlo.compare"
        and any(f" {direction}" in str(decision.attributes["comparison_direction"]) for direction in _COMPARISONS)
    )


def _adds(op: Any) -> bool:
    update = _owner(_terminator(op.regions[0]).operands[0])
    return update is not None and update.name == "stablehlo.add"


def _is_known_power(op: Any) -> bool:
    """Whether the exponent is a constant integer, or the base a constant (as `decay ** step` of optimizers has it)."""
    base, exponent = (_constant(operand) for operand in op.operands)
    return base is not None or (exponent is not None and exponent.is_integer())


def _large(op: Any, attribute: str) -> list[int]:
    """An attribute of window sizes, empty where they are all 1."""
    if attribute not in op.attributes:
        return []
    values = [int(value) for value in op.attributes[attribute]]
    return values if any(value > 1 for value in values) else []


def _trip_count(op: Any, arguments: Arguments) -> int | None:
    """Trips of a `stablehlo.while`, where they are known when compiling."""
    condition, body = op.regions
    test, update = _owner(_terminator(condition).operands[0]), _terminator(body)
    if test is None or test.name != "stablehlo.compare":
        return None
    direction = str(test.attributes["comparison_direction"]).split()[-1].rstrip(">")
    counter, bound = test.operands
    index = _argument(counter, condition)
    if index is None:
        counter, bound = bound, counter
        index = _argument(counter, condition)
        direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction, direction)
    if index is None:
        return None
    limit, start, step = _integer(bound, arguments), _integer(op.operands[index], arguments), None
    made = _owner(update.operands[index])
    if made is not None and made.name in ("stablehlo.add", "stablehlo.subtract"):
        own = [_argument(operand, body) == index for operand in made.operands]
        if own == [True, False]:
            step = _integer(made.operands[1], arguments)
            step = -step if step is not None and made.name == "stablehlo.subtract" else step
        elif own == [False, True] and made.name == "stablehlo.add":
            step = _integer(made.operands[0], arguments)
    if limit is None or start is None or step is None:
        return None
    return count_trips(start, limit, step, direction)


# --- Values --------------------------------------------------------------------------------------


def _owner(value: Any) -> Any | None:
    """The operation that makes a value; None for an argument of a block."""
    owner = value.owner
    return owner.operation if hasattr(owner, "operation") else None


def _callee(call: Any) -> Any:
    from jaxlib.mlir import ir

    module = call
    while module.parent is not None:
        module = module.parent.operation
    return ir.SymbolTable(module)[str(call.attributes["callee"]).lstrip("@").strip('"')].operation


def _argument(value: Any, region: Any) -> int | None:
    """Which argument of a region's block a value is."""
    for number, argument in enumerate(region.blocks[0].arguments):
        if argument == value:
            return number
    return None


@functools.cache  # a value may be reached in many ways
def _integer(value: Any, arguments: Arguments) -> int | None:
    """The value of an integer scalar that is known when compiling.

    Args:
        arguments: those of the function that it is in.
    """
    from jaxlib.mlir import ir

    if getattr(value.type, "rank", 0):
        return None
    op = _owner(value)
    if op is None:
        owner, number = value.owner.owner.operation, value.arg_number
        if owner.name == "func.func":
            return arguments[number] if number < len(arguments) else None
        if owner.name == "stablehlo.while" and number == _argument(
            _terminator(owner.regions[1]).operands[number], owner.regions[1]
        ):
            return _integer(owner.operands[number], arguments)  # carried unchanged
        return None
    if op.name == "stablehlo.constant":
        try:
            return int(ir.DenseIntElementsAttr(op.attributes["value"])[0])
        except ValueError:
            return None
    if op.name in ("stablehlo.convert", "stablehlo.reshape", "stablehlo.optimization_barrier"):
        return _integer(op.operands[list(op.results).index(value)], arguments)
    if op.name in _FOLDED:
        values = [_integer(operand, arguments) for operand in op.operands]
        return None if None in values else _FOLDED[op.name](*values)
    if op.name == "func.call":  # jnp.clip, say, is a function of its own
        known = tuple(_integer(operand, arguments) for operand in op.operands)
        return _integer(_terminator(_callee(op).regions[0]).operands[list(op.results).index(value)], known)
    if op.name == "stablehlo.case" and (index := _integer(op.operands[0], arguments)) is not None:
        # How lax.platform_dependent says which platform it is compiled for.
        branch = op.regions[min(max(index, 0), len(op.regions) - 1)]
        return _integer(_terminator(branch).operands[0], arguments)
    return None


def _constant(value: Any) -> float | None:
    """The one number that a constant array holds."""
    from jaxlib.mlir import ir

    op = _owner(value)
    while op is not None and op.name in ("stablehlo.broadcast_in_dim", "stablehlo.convert", "stablehlo.reshape"):
        value = op.operands[0]
        op = _owner(value)
    if op is None or op.name != "stablehlo.constant":
        return None
    elements = op.attributes["value"]
    if not isinstance(elements, ir.DenseElementsAttr) or not elements.is_splat:
        return None
    return float(ir.FloatAttr(elements.get_splat_value()).value) if not _is_integer(value) else 1.0


def _element(value: Any) -> Any:
    return getattr(value.type, "element_type", value.type)


def _is_integer(value: Any) -> bool:
    """Of integers, booleans aside."""
    from jaxlib.mlir import ir

    element = _element(value)
    return isinstance(element, ir.IntegerType) and element.width > 1


def _is_static(type_: Any) -> bool:
    return getattr(type_, "has_static_shape", True)


def _type(value: Any) -> str:
    return str(value.type).removeprefix("tensor<").removesuffix(">")
