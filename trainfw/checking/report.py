from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainfw.checking.rules import RULES, SEVERITIES, Ruling, Severity, Target
from trainfw.hlo import Place
from trainfw.report import findings_page, framed
from trainfw.tables import table


@dataclass(frozen=True)
class Finding:
    """A rule that a program breaks at one place."""

    rule: str
    message: str
    place: Place | None = None
    """The line of user code; None where there is none (an argument, the program as a whole)."""
    op_name: str = ""
    """JAX's name of the operation, or of the argument."""
    program: str = ""
    """Name of the compiled function: `train`, `evaluate`."""
    count: int = 1
    """Number of operations at that place, in the function that has most."""
    programs: tuple[str, ...] = ()
    """Names of all compiled functions that have it, in a report."""
    origin: str = ""
    """Call on the line that this is part of, such as `jit(solve)`: only there do rules hide others."""
    ruling: Ruling | None = None
    """Ruling on the target; None before that is known, when the most severe counts."""

    @property
    def severity(self) -> Severity:
        return (self.ruling or RULES[self.rule]).severity

    @property
    def source(self) -> str:
        return RULES[self.rule].source

    @property
    def instead(self) -> str:
        return RULES[self.rule].instead

    @property
    def note(self) -> str:
        """Say where documents and measurements disagree, or what is not confirmed; empty for neither."""
        return (self.ruling or RULES[self.rule]).note

    def to_json(self) -> dict[str, object]:
        return {
            "rule": self.rule,
            "severity": self.severity,
            "message": self.message,
            "file": self.place.file if self.place else None,
            "line": self.place.line if self.place else None,
            "op_name": self.op_name or None,
            "program": self.program,
            "count": self.count,
            "source": self.source,
            "instead": self.instead,
            "note": self.note or None,
            "keyed_on": RULES[self.rule].keyed_on,
        }

    def __str__(self) -> str:
        times = f" ({self.count} operations)" if self.count > 1 else ""
        rows = {"rule": RULES[self.rule].summary, "note": self.note, "instead": self.instead, "source": self.source}
        return finding_text(self, self.severity, f"{self.message}{times}", rows)


def finding_text(finding: Any, severity: str, message: str, rows: Mapping[str, str]) -> str:
    """Lay out a `Finding` or `CompilerFinding`: where it is, what is there, and further rows that say something."""
    place, name, whole = finding.place, finding.op_name, finding.program or "the program"
    rows = {"in": name if place else "", **rows}
    head = f"{severity}: {finding.rule}: {place or name or f'{whole} as a whole'}"
    return "\n".join([head, f"    {message}", *(f"    {key:8} {text}" for key, text in rows.items() if text)])


@dataclass(frozen=True)
class CollectiveSum:
    """Sum of the collectives of one kind, dtype and set of groups in one run of a function."""

    kind: str
    scattered: bool
    """All-reduces of which each device keeps its part only, which compilers turn into reduce-scatters."""
    axes: tuple[str, ...] | None
    """Mesh axes; None for groups that are not along whole axes."""
    dtype: str
    group_size: int
    count: int
    """Executions in one run."""
    bytes: int
    """Bytes on one core in one run: the sum of the whole buffers."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one core."""

    arguments: int
    """State and inputs, exact from their shardings."""
    overhead: int
    """Bytes that the runtime takes for itself."""
    temporaries: int | None
    """Bytes that XLA's CPU compiler takes beyond the arguments: a prediction, which overstates. None: not known."""
    capacity: float | None
    """Device memory of the core. None: no figure."""


@dataclass(frozen=True, repr=False)
class Report:
    """Findings of a check."""

    hardware: str
    cores: int
    sdk: str | None
    """The Neuron SDK whose rules were read; None where Neuron's rules do not apply."""
    findings: tuple[Finding, ...]
    """Most severe first, then by place."""
    collectives: tuple[CollectiveSum, ...] = ()
    """Collectives of the first function (the training step)."""
    memory: Memory | None = None
    """Memory of the function that takes most."""

    @property
    def errors(self) -> list[Finding]:
        return self._of("error")

    @property
    def warnings(self) -> list[Finding]:
        return self._of("warning")

    @property
    def notes(self) -> list[Finding]:
        return self._of("note")

    @property
    def ok(self) -> bool:
        """Tell whether there are no errors."""
        return not self.errors

    @property
    def verdict(self) -> str:
        counts = ", ".join(f"{len(self._of(s))} {s}{'s' * (len(self._of(s)) != 1)}" for s in SEVERITIES)
        rules = f"Neuron SDK {self.sdk}" if self.sdk else "memory only: Neuron's rules do not apply to this hardware"
        return f"{'clean' if self.ok else 'refused'}: {counts} ({self.hardware}, {self.cores} cores, {rules})"

    def to_json(self) -> dict[str, object]:
        """Give plain data, as `trainfw check --json` prints it. Bytes are per core, in one run of the function."""
        return {
            "ok": self.ok,
            "hardware": self.hardware,
            "cores": self.cores,
            "sdk": self.sdk,
            "findings": [finding.to_json() for finding in self.findings],
            "collectives": [asdict(row) for row in self.collectives],
            "memory": asdict(self.memory) if self.memory else None,
        }

    def __repr__(self) -> str:
        return f"<Report: {self.verdict}>"

    def _repr_html_(self) -> str:
        cells = [("severity", "rule", "where", "what is there", "instead")]
        cells += [
            (f.severity, f.rule, str(f.place or f.op_name or f.program), f.message, f.instead) for f in self.findings
        ]
        memory = "\n".join(_memory(self.memory)) if self.memory else ""
        return framed(findings_page(self.verdict, cells, _cells(self.collectives), memory))

    def __str__(self) -> str:
        parts = [str(finding) for finding in self.findings]
        if self.collectives:
            parts.append("\n".join(table(_cells(self.collectives), "<<<>>>")))
        if self.memory:
            parts.append("\n".join(_memory(self.memory)))
        return "\n\n".join([*parts, self.verdict])

    def _of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]


def on_target(findings: Iterable[Finding], target: Target) -> list[Finding]:
    """Select the findings whose rules count on a target, as they count there."""
    ruled = [(finding, RULES[finding.rule].on(target)) for finding in findings]
    return [replace(finding, ruling=ruling) for finding, ruling in ruled if ruling is not None]


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Merge findings: one for each rule and place, with what other rules hide left out; most severe first."""
    findings = list(findings)
    hiding: dict[tuple[str, Place | None, str], set[str]] = defaultdict(set)
    for finding in findings:
        for rule in RULES[finding.rule].hides if finding.place else ():
            if rule != finding.rule:
                hiding[rule, finding.place, finding.program].add(finding.origin)
    first: dict[Any, Finding] = {}
    counts: dict[Any, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for finding in findings:
        origins = hiding[finding.rule, finding.place, finding.program]
        if origins and (finding.origin in origins or "" in (finding.origin, *origins)):
            continue
        # Without a place, the message tells one from another.
        key = (finding.rule, finding.place or (finding.op_name, finding.message))
        first.setdefault(key, finding)
        counts[key][finding.program] += finding.count
    kept = [
        replace(finding, count=max(counts[key].values()), programs=tuple(filter(None, counts[key])))
        for key, finding in first.items()
    ]
    return tuple(sorted(kept, key=lambda f: (SEVERITIES.index(f.severity), f.place is None, f.place or Place("", 0))))


def _cells(rows: Iterable[CollectiveSum]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = [("collective", "axes", "dtype", "groups of", "times", "bytes a core")]
    for row in rows:
        kind = f"{row.kind}, scattered" if row.scattered else row.kind
        axes = "part of an axis" if row.axes is None else ", ".join(row.axes)
        cells.append((kind, axes, row.dtype, str(row.group_size), f"{row.count:,}", _size(row.bytes)))
    return cells


def _memory(memory: Memory) -> list[str]:
    lines = [f"memory a core     {_size(memory.arguments)} state and inputs, {_size(memory.overhead)} runtime"]
    if memory.temporaries is not None:
        size = _size(memory.temporaries)
        lines.append(f"                  {size} temporaries of XLA's CPU compiler, which widens bf16 to f32")
        lines.append("                  (trainfw plan counts them as the program asked for)")
    if memory.capacity is not None:
        lines.append(f"                  of {_size(memory.capacity)}")
    return lines


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
