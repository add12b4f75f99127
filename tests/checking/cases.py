"""Tables of small programs and of what a check says of them (`cases/*.yaml`).

A file is a list of programs:

    - program: jnp.sort(x)          # an expression of the arguments, or lines that return
      with: x f32[16]; i i32[4]     # name dtype[shape], or name = value
      source: ...                   # left out, that of the program before
      expect:
        trn2 trn3: error sort       # severities and rules, all of them; `clean`: no error, no warning
        inf2 trn1, SDK >= 2.32: clean

and, where they are needed: `near` (the rule that it nearly breaks), `x64`, `mesh` (sizes by axis; an argument is split
by `x f32[16] @ 'data', None`), `order` (of the mesh's devices), `hardware` (by chip), `limits` (of the SDK's profile).
jax, jnp, lax, np, nn, random, P and mesh are in scope.

A line of `expect` stands for every chip in it, with every SDK that it allows (all, where it names none) and for one LNC
(the hardware's default, where it names none): each chip is one row. Lines do not overlap. A finding is at the line that
ends in `# here`, or else at the program's only one. `python -m tests.checking.cases` counts rows.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax import lax
from jax.experimental import checkify, io_callback, sparse
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainfw.backends import load_sdk, sdk_versions
from trainfw.checking import Report
from trainfw.checking.programs import Called, Reading, begin, judge
from trainfw.checking.rules import CHIPS, RULES, SEVERITIES, within
from trainfw.hardware import load_topology
from trainfw.yaml_text import load

DIRECTORY = Path(__file__).parent / "cases"
HARDWARE = {
    "inf2": "inf2.48xlarge",
    "trn1": "trn1.32xlarge",
    "trn2": "trn2.48xlarge",
    "trn3": "trn3-gen2-ultraserver",
}
VERDICTS = ("clean", *reversed(SEVERITIES))
_FIELDS = {"program", "near", "with", "source", "expect", "x64", "mesh", "order", "hardware", "limits"}
_DTYPES = {
    "f64": jnp.float64,
    "f32": jnp.float32,
    "f16": jnp.float16,
    "bf16": jnp.bfloat16,
    "bool": jnp.bool_,
    "c64": jnp.complex64,
    **{f"i{bits}": getattr(jnp, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": getattr(jnp, f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_SCOPE = {
    "jax": jax,
    "jnp": jnp,
    "lax": lax,
    "np": np,
    "nn": jax.nn,
    "random": jax.random,
    "checkify": checkify,
    "io_callback": io_callback,
    "sparse": sparse,
    "P": P,
}


@dataclass(frozen=True)
class Case:
    """A program of a table."""

    file: Path
    line: int
    """Of the program's first line."""
    text: str
    fields: Fields
    source: str

    @property
    def name(self) -> str:
        return f"{self.file.stem}:{self.line}"

    @property
    def mesh(self) -> Mesh | None:
        sizes = self.fields.get("mesh")
        if sizes is None:
            return None
        order = self.fields.get("order", range(np.prod(list(sizes.values()))))
        devices = np.array(jax.devices())[list(order)].reshape(list(sizes.values()))
        return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    @property
    def marked(self) -> int:
        """The line that findings are at."""
        lines = self.text.rstrip("\n").split("\n")
        marked = [number for number, text in enumerate(lines) if text.endswith("# here")]
        assert len(marked) == 1 or len(lines) == 1, f"{self.name}: mark one line with `# here`"
        return self.line + (marked[0] if marked else 0)

    def rows(self) -> Iterator[Row]:
        for key, said in self.fields["expect"].items():
            chips, *conditions = (part.strip() for part in key.split(","))
            lnc, bounds = None, {}
            for condition in conditions:
                what, _, bound = condition.partition(" ")
                if what == "LNC":
                    lnc = int(bound)
                else:
                    assert what in ("SDK", "libneuronxla"), (
                        f"{self.name}: {condition!r}: expected SDK, LNC, libneuronxla"
                    )
                    bounds[what] = bound
            sdks = tuple(
                version
                for version in sdk_versions()
                if within(version, bounds.get("SDK"))
                and within(load_sdk(version).packages["libneuronxla"], bounds.get("libneuronxla"))
            )
            for chip in CHIPS if chips == "all" else chips.split():
                yield Row(self, chip, lnc, sdks, _expected(str(said)), key)


@dataclass(frozen=True)
class Row:
    """A program on one chip, with some SDKs, and what is said of it there."""

    case: Case
    chip: str
    lnc: int | None
    sdks: tuple[str, ...]
    expected: frozenset[tuple[str, str]]
    """Severity and rule of each finding."""
    key: str

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.chip}-{self.key}"

    @property
    def verdict(self) -> str:
        """The worst that is said."""
        return next((s for s in SEVERITIES if any(s == severity for severity, _ in self.expected)), "clean")

    def reports(self) -> Iterator[Report]:
        name = self.case.fields.get("hardware", {}).get(self.chip, HARDWARE[self.chip])
        topology = load_topology(name, lnc=self.lnc)
        for version in self.sdks:
            sdk = load_sdk(version).model_copy(update=self.case.fields.get("limits", {}))
            yield judge([reading(self.case)], topology, sdk)


@functools.cache
def cases() -> tuple[Case, ...]:
    return tuple(case for path in sorted(DIRECTORY.glob("*.yaml")) for case in _load(path))


@functools.cache
def rows() -> tuple[Row, ...]:
    return tuple(row for case in cases() for row in case.rows())


@functools.lru_cache(maxsize=4)  # rows of a program come one after another
def reading(case: Case) -> Reading:
    """What is read of a program, once for all chips and SDKs."""
    with jax.enable_x64(True) if case.fields.get("x64") else contextlib.nullcontext():
        names, values = _arguments(case)
        with ThreadPoolExecutor(1) as pool:
            return begin(pool, Called("program", jax.jit(_function(case, names)), values, case.mesh))()


def counted() -> list[str]:
    """Lines that say how many rows there are, by chip and verdict."""
    count = collections.Counter((row.chip, row.verdict) for row in rows())
    lines = [f"{'chip':6}" + "".join(f"{verdict:>9}" for verdict in VERDICTS) + f"{'rows':>9}"]
    for chip in CHIPS:
        of = [count[chip, verdict] for verdict in VERDICTS]
        lines.append(f"{chip:6}" + "".join(f"{number:9,}" for number in [*of, sum(of)]))
    checks = sum(len(row.sdks) for row in rows())
    return [
        *lines,
        f"{len(cases()):,} programs, {len(rows()):,} rows; with every SDK that they allow {checks:,} checks",
    ]


def _load(path: Path) -> Iterator[Case]:
    root = yaml.compose(path.read_text())
    assert isinstance(root, yaml.SequenceNode), f"{path.name}: expected a list of programs"
    source = ""
    for node, fields in zip(root.value, load(path.read_text(), path), strict=True):
        (mark,) = [value.start_mark for key, value in node.value if key.value == "program"]
        text = str(fields["program"])
        line = mark.line + (2 if "\n" in text else 1)
        assert set(fields) <= _FIELDS, f"{path.name}:{line}: unknown: {', '.join(sorted(set(fields) - _FIELDS))}"
        source = fields.get("source", source)
        assert source, f"{path.name}:{line}: no source"
        yield Case(path, line, text, Fields(fields), source)


class Fields(dict[str, Any]):
    """What a table says of a program; each is one of its own."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _expected(said: str) -> frozenset[tuple[str, str]]:
    if said == "clean":
        return frozenset()
    found = set()
    for part in said.split(";"):
        severity, *names = part.replace(",", " ").split()
        assert severity in SEVERITIES, f"{said!r}: expected clean, or error, warning, note with rules"
        assert set(names) <= set(RULES), f"{said!r}: no such rule"
        found |= {(severity, name) for name in names}
    return frozenset(found)


def _function(case: Case, names: list[str]) -> Callable[..., Any]:
    """The program as a function, whose lines are those of the table."""
    body = case.text.rstrip("\n").split("\n")
    with contextlib.suppress(SyntaxError):
        compile(case.text, str(case.file), "eval")
        body = [f"return {case.text.strip()}"] if len(body) == 1 else body
    text = "\n" * (case.line - 2) + f"def program({', '.join(names)}):\n" + "".join(f"    {line}\n" for line in body)
    scope = _SCOPE | {"mesh": case.mesh}
    exec(compile(text, str(case.file), "exec"), scope)
    return scope["program"]  # type: ignore[return-value]


def _arguments(case: Case) -> tuple[list[str], tuple[Any, ...]]:
    names, values = [], []
    for part in filter(None, (part.strip() for part in case.fields.get("with", "").split(";"))):
        if found := re.fullmatch(r"(\w+) = (.+)", part):
            value = jax.eval_shape(lambda text=found[2]: eval(text, dict(_SCOPE)))
            values.append(
                value if hasattr(value, "todense") or hasattr(value, "dtype") else eval(found[2], dict(_SCOPE))
            )
        else:
            found = re.fullmatch(r"(\w+) (\w+)\[(.*?)\](?: @ (.+))?", part)
            assert found is not None, f"{case.name}: {part!r}: expected name dtype[shape], or name = value"
            dtype = _DTYPES.get(found[2]) or getattr(jnp, found[2])
            values.append(jax.ShapeDtypeStruct(_shape(found[3]), dtype, sharding=_sharding(case, found[4])))
        names.append(found[1])
    return names, tuple(values)


def _shape(text: str) -> tuple[Any, ...]:
    if re.search(r"[a-z]", text):
        return jax.export.symbolic_shape(text)
    return tuple(eval(f"[{text}]"))


def _sharding(case: Case, spec: str | None) -> NamedSharding | None:
    if case.mesh is None:
        return None
    return NamedSharding(case.mesh, P(*eval(f"[{spec}]")) if spec else P())


if __name__ == "__main__":
    print("\n".join(counted()))
