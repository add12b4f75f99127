"""Rules on what only the jaxpr still says: modes of gathers, kinds of keys, callbacks, and the program's own dtypes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import source_info_util
from jax.extend import core
from jax.interpreters import partial_eval

from trainfw.checking.report import Finding
from trainfw.hlo import Place, user_place

_LISTED = {
    *("bool", "bfloat16", "float16", "float32", "int32", "uint32", "uint8"),
    *("float8_e5m2", "float8_e4m3", "float8_e3m4", "float0"),
}
_DTYPES = {
    "float64": "dtype-f64",
    "complex.*": "dtype-complex",
    "u?int64": "dtype-int64",
    ".*fnuz": "dtype-f8fnuz",
    "float8_e4m3fn": "dtype-f8e4m3fn",
    "float4_e2m1fn": "dtype-f4",
    ".*": "dtype-unlisted",
}
"""Form of a dtype that is not listed -> its rule."""
_SPARSE = ("bcoo_", "bcsr_", "coo_", "csr_")


def read_jaxpr(closed: core.ClosedJaxpr) -> list[Finding]:
    """List findings in a jax.core.ClosedJaxpr, of rules that count on any target."""
    findings: list[Finding] = []
    seen: dict[tuple[int, Place | None, str], Any] = {}

    def live(jaxpr: core.Jaxpr) -> core.Jaxpr:
        """Drop what nothing comes of, as compilers do (JAX itself does before it lowers). Effects stay."""
        return partial_eval.dce_jaxpr(jaxpr, True, instantiate=True)[0]

    def visit(jaxpr: core.Jaxpr, caller: Place | None, calling: str) -> None:
        if (id(jaxpr), caller, calling) in seen:
            return
        seen[id(jaxpr), caller, calling] = jaxpr  # kept, or another could get its id
        for eqn in live(jaxpr).eqns:
            own = eqn_place(eqn)
            place, origin = (own, _origin(eqn)) if own else (caller, calling)
            name = str(eqn.source_info.name_stack)
            op_name = f"{name}/{eqn.primitive.name}" if name else eqn.primitive.name
            findings.extend(Finding(rule, message, place, op_name, origin=origin) for rule, message in _read(eqn))
            for inner in sub_jaxprs(eqn):
                visit(inner, place, origin)

    visit(live(closed.jaxpr), None, "")  # the outer one first, so that it is known what of the inner ones is used
    findings.extend(_arguments(closed.jaxpr, {f.rule for f in findings}))
    return findings


def meshes_in(closed: core.ClosedJaxpr) -> list[jax.sharding.Mesh | jax.sharding.AbstractMesh]:
    """List the meshes, abstract too, that a jax.core.ClosedJaxpr names: of shard_maps, constraints, inner jits."""
    meshes: dict[Any, None] = {}
    for name, value in (item for eqn in _equations(closed.jaxpr) for item in eqn.params.items()):
        if name == "mesh" and isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
            meshes.setdefault(value)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, jax.sharding.NamedSharding):
                meshes.setdefault(part.mesh)
    return [mesh for mesh in meshes if not mesh.empty]


def targets_in(closed: core.ClosedJaxpr) -> set[str]:
    """Return the targets of the custom calls (jax.ffi.ffi_call) in a jax.core.ClosedJaxpr."""
    return {str(eqn.params.get("target_name", "")) for eqn in _equations(closed.jaxpr)}


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from _equations(inner)


def eqn_place(eqn: Any) -> Place | None:
    """Return the user's line that made an equation; None inside JAX's own jitted functions."""
    if eqn.source_info.traceback is None:
        return None
    frames = source_info_util.user_frames(eqn.source_info.traceback)
    return user_place(Place(frame.file_name, frame.start_line) for frame in frames)


def place_of_failure(error: BaseException) -> tuple[Place | None, str]:
    """Find the place in user code of the operation that JAX failed to lower, and the call on that line that made it."""
    place, origin = None, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # JAX lowers equation by equation, each inside the lowering of the one that contains it.
        eqn = frame.f_locals.get("eqn")
        if hasattr(eqn, "source_info") and (own := eqn_place(eqn)):
            place, origin = own, _origin(eqn)
    return place, origin


def _origin(eqn: Any) -> str:
    """Name the call of a line of user code, as StableHLO does too: `jit(solve)`, `sort`."""
    name = eqn.params.get("name")
    return f"jit({name})" if eqn.primitive.name == "jit" else eqn.primitive.name


def read_symbolic(closed: core.ClosedJaxpr) -> list[Finding]:
    """List arguments whose shapes have symbols (`jax.export.symbolic_shape`), where they are first used."""
    return [
        Finding("shape-dynamic", f"argument {number} is {_shape(variable)}", _first_use(closed.jaxpr, variable))
        for number, variable in enumerate(closed.jaxpr.invars)
        if not all(isinstance(size, int) for size in getattr(variable.aval, "shape", ()))
    ]


def sub_jaxprs(eqn: core.JaxprEqn) -> Iterator[Any]:
    """List the jaxprs in an equation's parameters: bodies of loops, branches, jitted and differentiated functions."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _read(eqn: core.JaxprEqn) -> Iterator[tuple[str, str]]:
    name = eqn.primitive.name
    if name.endswith("callback") or name == "debug_print":
        yield "control-callback", f"calls back to the host ({name})"
    elif name == "check":
        yield "control-checkify", "a checkify.check"
    elif name == "gather" and _drops(eqn):
        yield "gather-fill", f"gathers from {_shape(eqn.invars[0])} with mode=fill"
    elif name.startswith("scatter") and _drops(eqn):
        yield "scatter-drop", f"{name} into {_shape(eqn.invars[0])} with mode=drop"
    elif name == "threefry2x32" or (name.startswith("random_") and _threefry(eqn)):
        yield "rng-threefry", f"{name} with a Threefry key"
    elif name in ("real", "imag"):
        yield "dtype-complex", f"takes {_shape(eqn.invars[0])}"
    elif name.startswith(_SPARSE):
        yield "sparse", f"{name} of jax.experimental.sparse"
    elif name in ("dot_general", "ragged_dot_general") and (asked := _algorithm(eqn)):
        yield "dot-algorithm", f"multiplies {_shape(eqn.invars[0])} and {_shape(eqn.invars[1])} with {asked}"
    elif _is_randint(eqn):
        yield "rng-randint", f"draws {_shape(eqn.outvars[0])} with jax.random.randint"
    for variable in eqn.outvars:
        yield from _dtype(variable)


def _dtype(variable: core.Var) -> Iterator[tuple[str, str]]:
    dtype = str(getattr(variable.aval, "dtype", "bool"))
    if dtype not in _LISTED and "<" not in dtype:  # `key<rbg>` is a type of JAX alone
        rule = next(rule for pattern, rule in _DTYPES.items() if re.fullmatch(pattern, dtype))
        yield rule, f"makes {_shape(variable)}"


def _arguments(jaxpr: core.Jaxpr, found: set[str]) -> Iterator[Finding]:
    """List arguments of a dtype that no operation's result has shown already, where they are first used."""
    for number, variable in enumerate(jaxpr.invars):
        for rule, _ in _dtype(variable):
            if rule not in found:
                message = f"argument {number} is {_shape(variable)}"
                yield Finding(rule, message, _first_use(jaxpr, variable), f"argument {number}")


def _first_use(jaxpr: core.Jaxpr, variable: core.Var) -> Place | None:
    return next((eqn_place(eqn) for eqn in jaxpr.eqns if any(v is variable for v in eqn.invars)), None)


def _drops(eqn: core.JaxprEqn) -> bool:
    return getattr(eqn.params.get("mode"), "name", "") == "FILL_OR_DROP"


def _threefry(eqn: core.JaxprEqn) -> bool:
    impl = eqn.params.get("impl")
    impls = [impl] if impl is not None else []
    impls += [getattr(getattr(v.aval, "dtype", None), "_impl", None) for v in (*eqn.invars, *eqn.outvars)]
    return any(getattr(impl, "name", "") == "threefry2x32" for impl in impls)


def _is_randint(eqn: core.JaxprEqn) -> bool:
    """Tell whether it is a call of JAX's own function: people have randints too."""
    if eqn.params.get("name") not in ("_randint", "randint"):
        return False
    return any("/jax/_src/random" in str(inner.debug_info.func_src_info) for inner in sub_jaxprs(eqn))


def _algorithm(eqn: core.JaxprEqn) -> str:
    """Return the algorithm that a product asks for; empty for a plain precision."""
    precision = eqn.params.get("precision")
    asked = type(precision).__name__.startswith("DotAlgorithm") and getattr(precision, "name", "") != "DEFAULT"
    return str(precision) if asked else ""


def _shape(variable: Any) -> str:
    aval = variable.aval
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]" if hasattr(aval, "dtype") else str(aval)
