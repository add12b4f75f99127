"""Rules on the operations of a StableHLO module, which is what Neuron would be given."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from trainfw.checking.report import Finding
from trainfw.checking.rules import custom_calls, known_operators
from trainfw.checking.values import (
    Arguments,
    argument_of,
    arguments_of,
    forget,
    integer_of,
    owner_of,
    range_of,
    terminator,
)
from trainfw.hlo import Place, count_trips, user_place

_COMPARISONS = ("LT", "LE", "GT", "GE")
_COMBINING = ("add", "multiply", "maximum", "minimum", "and", "or", "xor")
"""Operations by which a scatter may combine with what is there; it may also write over it."""

_MX_TYPES = ("f8E5M2", "f8E4M3FN")
"""Element types of operands of microscaling products."""


def read_stablehlo(module: Any) -> list[Finding]:
    """List findings in a module as `lowered.compiler_ir("stablehlo")` gives it, of rules that count on any target."""
    named = (op for op in module.body.operations if op.operation.name == "func.func")
    functions = {str(op.attributes["sym_name"]).strip('"'): op.operation for op in named}
    findings: list[Finding] = []
    seen: set[Any] = set()
    partitions = module.operation.attributes
    several = "mhlo.num_partitions" in partitions and int(partitions["mhlo.num_partitions"].value) > 1

    def visit(name: str, caller: Place | None, calling: str, arguments: Arguments, split: bool) -> None:
        if (name, caller, calling, arguments, split) in seen or name not in functions:
            return
        seen.add((name, caller, calling, arguments, split))
        walk(functions[name], caller, calling, arguments, split)

    def walk(parent: ir.Operation, caller: Place | None, calling: str, arguments: Arguments, split: bool) -> None:
        for op in _inside(parent):
            frames, op_name = _location(op.location)
            # JAX's own jitted functions are compiled apart, without lines: theirs is the caller's.
            own = user_place(frames)
            place, origin = (own, op_name.rpartition("/")[2].rstrip(":")) if own else (caller, calling)
            if op.name == "func.call":
                known = arguments_of(op.operands, arguments)
                visit(str(op.attributes["callee"]).lstrip("@").strip('"'), place, origin, known, split)
                continue
            found = [*_read(op, arguments)]
            if split and op.name == "stablehlo.gather" and _dims(op, "operand_batching_dims"):  # it is to be split
                found.append(("gather-batched", f"gathers from {_type(op.operands[0])} with batching dims"))
            findings.extend(Finding(rule, message, place, op_name, origin=origin) for rule, message in found)
            walk(op, place, origin, arguments, split and op.name != "sdy.manual_computation")

    visit("main", None, "", Arguments(), several)
    forget()  # what keeps the module
    return findings


def _inside(op: ir.Operation) -> Iterator[ir.Operation]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation


def _location(location: Any) -> tuple[list[Place], str]:
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
    if not all(getattr(value.type, "has_static_shape", True) for value in (*op.operands, *op.results)):
        yield "shape-dynamic", f"{name} of a dynamic shape"
    if dialect == "chlo":  # decomposed into stablehlo, all but these
        if name == "top_k":
            yield "topk", f"top_k of {_type(op.operands[0])}"
            if _is_integer(op.operands[0]):
                yield "topk-integer", f"top_k of {_type(op.operands[0])}"
        elif name == "ragged_dot":
            yield "op-unlisted", f"{op.name} of {_type(op.operands[0])}"
    if dialect != "stablehlo":
        return
    match name:
        case "case" | "if" if len(op.regions) > 1 and integer_of(op.operands[0], arguments) is None:
            yield "control-cond", f"a conditional of {len(op.regions)} branches"
        case "while" if _trip_count(op, arguments) is None:
            yield "control-while", "a while loop whose trip count is not known when compiling"
        case "rng_bit_generator" if "DEFAULT" not in str(op.attributes["rng_algorithm"]):
            yield "rng-algorithm", f"rng_bit_generator with {op.attributes['rng_algorithm']}"
        case "sort":
            yield "sort", f"sorts {_type(op.operands[0])}"
            if not _sorts_simply(op):
                yield "sort-comparator", f"a sort of {_type(op.operands[0])} whose comparator is not one comparison"
        case "reduce" | "reduce_window" if len(op.operands) > 2:
            rule = "reduce-variadic" if name == "reduce" else "reduce-window-variadic"
            yield rule, f"reduces {len(op.operands) // 2} arrays at once ({_type(op.operands[0])}, ...)"
        case "dot_general" | "dot" if _is_integer(op.operands[0]) or _is_integer(op.operands[1]):
            rule = "dot-int64" if 64 in (_bits(op.operands[0]), _bits(op.operands[1])) else "dot-integer"
            yield rule, f"multiplies {_type(op.operands[0])} and {_type(op.operands[1])}"
        case "scatter":
            yield from _read_scatter(op, arguments)
        case "gather":
            if past := _past_the_end(op, _dims(op, "start_index_map"), arguments):
                yield "gather-iota", f"gathers from {_type(op.operands[0])} at {past}"
        case "shift_right_arithmetic" if _bits(op.operands[0]) != 32:
            yield "shift-width", f"shifts {_type(op.operands[0])}"
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
            yield from _read_custom_call(op)
    if name == "reduce_window" and (dilation := _large(op, "base_dilations") or _large(op, "window_dilations")):
        yield "reduce-window-dilation", f"reduce_window with dilation {dilation}"
    is_complex = any("complex" in _type(value) for value in (*op.operands, *op.results))
    if name not in known_operators() and not is_complex:  # which is refused as such
        yield "op-unlisted", f"{op.name} of {_type(op.operands[0]) if len(op.operands) else 'nothing'}"


def _read_scatter(op: Any, arguments: Arguments) -> Iterator[tuple[str, str]]:
    update = owner_of(terminator(op.regions[0]).operands[0])
    combining = update.name.rpartition(".")[2] if update is not None else ""
    if combining in _COMBINING:
        into = f"{combining} into {_type(op.operands[0])}"
        if _is_integer(op.operands[0]):
            yield "scatter-integer", into
        elif _bits(op.operands[0]) == 1:
            yield "scatter-boolean", into
    elif combining not in ("", "constant") and (_is_integer(op.operands[0]) or _bits(op.operands[0]) == 1):
        yield "scatter-computing", f"computes ({combining}) in {_type(op.operands[0])}"
    if past := _past_the_end(op, _dims(op, "scattered_dims_to_operand_dims"), arguments):
        yield "scatter-iota", f"{combining or 'writes'} into {_type(op.operands[0])} at {past}"


def _past_the_end(op: Any, mapped: list[int], arguments: Arguments) -> str:
    """Say where a gather's or scatter's places count up past the end of the operand; empty where not known to.

    The compiler compares places with the dim, whatever the size of the window that is read at each. `mapped` are the
    operand's dims that the components of an index are for.
    """
    shape, indices = op.operands[0].type.shape, op.operands[len(op.operands) // 2 if len(op.operands) > 2 else 1]
    made = owner_of(indices)
    parts = [indices]
    if len(mapped) != 1:
        if made is None or made.name != "stablehlo.concatenate" or len(made.operands) != len(mapped):
            return ""
        parts = list(made.operands)
    for dim, part in zip(mapped, parts, strict=True):
        found = range_of(part, arguments)
        if found is not None and found.counted and found.high >= shape[dim]:
            return f"{found.low} to {found.high} of dim {dim}, which has {shape[dim]}"
    return ""


def _read_custom_call(op: ir.Operation) -> Iterator[tuple[str, str]]:
    target = str(op.attributes["call_target_name"]).strip('"')
    if target in custom_calls("microscaling"):
        yield "custom-call-mx", f"calls {target}"
        if problem := _form_problem(target, op):
            yield "custom-call-mx-form", f"calls {target} {problem}"
        return
    known = target in custom_calls("recognised") or target in custom_calls("partitioning")
    if not known and not target.startswith("xla.sdy."):
        yield "custom-call", f"calls {target}"


def _form_problem(target: str, op: ir.Operation) -> str:
    count = 1 if target == "QuantizeMX" else 4
    if len(op.operands) != count:
        return f"with {len(op.operands)} arrays; expected {count}"
    if target == "QuantizeMX":
        return _quantize_problem(op)
    if any(operand.type.rank < 2 for operand in op.operands[:2]):
        return f"of {_type(op.operands[0])} and {_type(op.operands[1])}; expected two dims or more"
    if str(_element(op.operands[0])) not in _MX_TYPES:
        return f"of {_type(op.operands[0])} on the left; expected float8_e5m2 or float8_e4m3fn"
    result = str(_element(op.results[0]))
    return "" if result in ("f32", "bf16") else f"with a result in {result}; expected f32 or bf16"


def _quantize_problem(op: ir.Operation) -> str:
    if len(op.results) != 2:
        return f"with {len(op.results)} results; expected 2"
    source, quantized = op.operands[0], op.results[0]
    if str(_element(source)) not in ("bf16", "f16"):
        return f"of {_type(source)}; expected bf16 or f16"
    shape = list(source.type.shape)
    if list(quantized.type.shape) != shape or str(_element(quantized)) not in _MX_TYPES:
        return f"of {_type(source)} with {_type(quantized)}; expected its shape, in float8_e5m2 or float8_e4m3fn"
    named = _quantized_dim(op)
    dim = named - len(shape) if named >= 0 else named
    if dim not in (-1, -2) or -dim > len(shape):
        return f"of {_type(source)} along dim {named}; expected the last or the last but one"
    return "" if shape[dim] % 4 == 0 else f"of {_type(source)} along dim {named}; expected a size divisible by 4"


def _quantized_dim(op: Any) -> int:
    """Read the dim that a QuantizeMX names in its backend_config; the last where that cannot be read."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        if "mhlo.backend_config" in op.attributes:
            return int(op.attributes["mhlo.backend_config"]["dim"].value)
        return int(json.loads(op.attributes["backend_config"].value)["dim"])
    return -1


def _reduces(op: Any) -> bool:
    """Tell whether a reduce_precision has fewer bits than the dtype of its operand."""
    kept = int(op.attributes["exponent_bits"]), int(op.attributes["mantissa_bits"])
    whole = {"f64": (11, 52), "f32": (8, 23), "bf16": (8, 7), "f16": (5, 10)}
    return kept != whole.get(_type(op.operands[0]).rpartition("x")[2])


def _sorts_simply(op: Any) -> bool:
    decision = owner_of(terminator(op.regions[0]).operands[0])
    if decision is None or decision.name != "stablehlo.compare":
        return False
    return any(f" {direction}" in str(decision.attributes["comparison_direction"]) for direction in _COMPARISONS)


def _is_known_power(op: ir.Operation) -> bool:
    """Tell whether the exponent is a constant integer, or the base a constant (as in `decay ** step` of optimizers)."""
    base, exponent = (_constant(operand) for operand in op.operands)
    return base is not None or (exponent is not None and exponent.is_integer())


def _large(op: Any, attribute: str) -> list[int]:
    """Read an attribute of window sizes; empty where they are all 1."""
    if attribute not in op.attributes:
        return []
    values = [int(value) for value in op.attributes[attribute]]
    return values if any(value > 1 for value in values) else []


def _trip_count(op: Any, arguments: Arguments) -> int | None:
    condition, body = op.regions
    test, update = owner_of(terminator(condition).operands[0]), terminator(body)
    if test is None or test.name != "stablehlo.compare":
        return None
    direction = str(test.attributes["comparison_direction"]).split()[-1].rstrip(">")
    counter, bound = test.operands
    index = argument_of(counter, condition)
    if index is None:
        counter, bound = bound, counter
        index = argument_of(counter, condition)
        direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction, direction)
    if index is None:
        return None
    limit, start = integer_of(bound, arguments), integer_of(op.operands[index], arguments)
    made = owner_of(update.operands[index])
    if made is None or made.name not in ("stablehlo.add", "stablehlo.subtract"):
        return None
    own = [argument_of(operand, body) == index for operand in made.operands]
    step = integer_of(made.operands[own.index(False)], arguments) if sorted(own) == [False, True] else None
    if made.name == "stablehlo.subtract":
        step = -step if step is not None and own[0] else None
    return None if limit is None or start is None or step is None else count_trips(start, limit, step, direction)


def _constant(value: Any) -> float | None:
    """Read the one number that a constant array holds."""
    op = owner_of(value)
    while op is not None and op.name in ("stablehlo.broadcast_in_dim", "stablehlo.convert", "stablehlo.reshape"):
        value = op.operands[0]
        op = owner_of(value)
    if op is None or op.name != "stablehlo.constant":
        return None
    elements = op.attributes["value"]
    if not isinstance(elements, ir.DenseElementsAttr) or not elements.is_splat:
        return None
    return float(ir.FloatAttr(elements.get_splat_value()).value) if not _is_integer(value) else 1.0


def _element(value: ir.Value) -> object:
    return getattr(value.type, "element_type", value.type)


def _is_integer(value: ir.Value) -> bool:
    """Tell whether an array is of integers, booleans aside."""
    element = _element(value)
    return isinstance(element, ir.IntegerType) and element.width > 1


def _bits(value: ir.Value) -> int:
    """Count the bits of an integer or boolean; 32 for what is neither."""
    element = _element(value)
    return element.width if isinstance(element, ir.IntegerType) else 32


def _dims(op: ir.Operation, name: str) -> list[int]:
    if op.name == "stablehlo.gather":
        return list(getattr(stablehlo.GatherDimensionNumbers(op.attributes["dimension_numbers"]), name))
    return list(getattr(stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"]), name))


def _type(value: ir.Value) -> str:
    return str(value.type).removeprefix("tensor<").removesuffix(">")
