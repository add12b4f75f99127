"""Differences of `check` and neuronx-cc on one recipe, as one small file without paths, host names or data."""

import contextlib
import functools
import getpass
import importlib.metadata
import itertools
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainfw import backends
from trainfw.checking.compiler import (
    GIB_EACH,
    compiler_version,
    compiles_at_once,
    export_steps,
    find_compiler,
    last_lines,
    run_compiler,
)
from trainfw.checking.compiler_output import CompilerFinding, Outcome, read_run
from trainfw.checking.report import Finding, Report
from trainfw.checking.rules import RULES, SEVERITIES
from trainfw.hlo import Exported
from trainfw.program import Program
from trainfw.recipe import Recipe

FORMAT = 1
_SECTIONS = ("model", "adapter", "optimizer", "train", "parallel", "hardware", "backend")
_OF_DATA = ("sequence_length", "mask_documents")
_NOT_SENT = ("from", "path", "directory", "sample_prompt", "rules", "parameters")
_PLAIN = re.compile(r"[\w.+\-=,*]{1,64}")
_SLASHED = re.compile(r"[^\s\"'`,;=]*/[^\s\"'`,;=]*")
_NO_PATH = re.compile(r"\(*p?jit\(.*|\(*\w+/\w+[).:]*|/+|/\*\w+|\d+\*/[^/]*")
"""Words with a slash that stay: JAX's names of operations, a pair (`MiB/s`, `TRN1/TRN2`), a comment of HLO's."""
_INSTANCE = re.compile(r"\bip-\d+-\d+-\d+-\d+[\w.\-]*")
"""Names that EC2 gives to hosts."""
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_MOST_LINES, _MOST_LETTERS = 3, 400
"""Bounds of an excerpt of HLO."""


@dataclass(frozen=True)
class Difference:
    """A rule or code on which one says that the compiler refuses the function, and the other does not."""

    function: str
    rule: str
    code: str | None
    check: str
    """The verdict of `check`: `error`, `warning`, `note`, `nothing`."""
    compiler: str
    """The compiler's: `refused it`, `passed it`, `failed` without a known code."""
    message: str
    hlo: tuple[str, ...]
    """The instructions that are blamed, without their metadata."""

    def __str__(self) -> str:
        subject = f"{self.function}: {self.code}" if self.code else self.function
        said = {"nothing": "nothing", "error": "an error"}.get(self.check, f"a {self.check}")
        known = f"check has {said} of {self.rule}" if self.rule in RULES else "no rule of check knows of it"
        lines = "".join(f"\n    {line}" for line in self.hlo)
        return f"{subject}: the compiler {self.compiler}, and {known}{lines}"


def _in_function(name: str, outcome: Outcome, own: list[Finding], module: Exported | str) -> Iterator[Difference]:
    """Compare what a check found in a function with the compiler's outcome.

    An error of `check` is contradicted by a compile that passed only where its rule names a code of the compiler's:
    others are about the runtime, or about results. A compile that ran out of memory or time says nothing; one that
    failed with no known code does, where `check` found no error.
    """
    errors = [finding for finding in own if finding.severity == "error"]
    if outcome.verdict == "refused":
        for said in outcome.findings:
            severity = min((f.severity for f in own if f.rule == said.rule), key=SEVERITIES.index, default="nothing")
            if severity != "error":
                hlo = _excerpt(module, [said.instruction])
                yield Difference(name, said.rule, said.code, severity, "refused it", scrubbed(said.message), hlo)
    elif outcome.verdict == "failed" and not errors:
        (said,) = outcome.findings
        yield Difference(name, said.rule, None, "nothing", "failed", scrubbed(said.message), ())
    elif outcome.verdict == "passed":
        for finding in errors:
            if code := re.search(r"NCC_[A-Z]+\d+", RULES[finding.rule].source):
                hlo = _excerpt(module, _instructions(module, finding))
                yield Difference(name, finding.rule, code[0], "error", "passed it", scrubbed(finding.message), hlo)


def _own(report: Report, name: str) -> list[Finding]:
    return [finding for finding in report.findings if name in finding.programs]


@dataclass(frozen=True)
class Comparison:
    """Verdicts of neuronx-cc on a recipe's steps, beside those of `check`."""

    version: str
    flags: list[str]
    report: Report
    modules: dict[str, Exported | str]
    outcomes: dict[str, Outcome]

    @functools.cached_property
    def differences(self) -> list[Difference]:
        return [
            difference
            for name, outcome in self.outcomes.items()
            for difference in _in_function(name, outcome, _own(self.report, name), self.modules[name])
        ]

    @property
    def passed(self) -> bool:
        return all(outcome.verdict == "passed" for outcome in self.outcomes.values())

    def difference_report(self, recipe: Recipe) -> dict[str, object]:
        """Give what `trainfw check --report-difference` writes; of the recipe, keys that shape the program."""
        versions = {name: _version(name) for name in ("trainfw", "jax", "jaxlib")}
        return {
            "format": FORMAT,
            "versions": {**versions, "neuronx-cc": self.version},
            "sdk": self.report.sdk,
            "hardware": self.report.hardware,
            "cores": self.report.cores,
            "flags": [scrubbed(flag) for flag in self.flags],
            "recipe": dict(_keys(recipe)),
            "functions": {name: _function(self.report, name, outcome) for name, outcome in self.outcomes.items()},
            "differences": [asdict(difference) for difference in self.differences],
        }

    def to_json(self) -> dict[str, object]:
        """Give plain data, which `trainfw check --compiler --json` adds to the report's, whose `ok` it replaces."""
        return {
            "ok": self.report.ok and self.passed,
            "compiler": {
                "version": self.version,
                "flags": self.flags,
                "ok": self.passed,
                "verdicts": {name: outcome.verdict for name, outcome in self.outcomes.items()},
                "findings": [f.to_json() for outcome in self.outcomes.values() for f in outcome.findings],
                "differences": [asdict(difference) for difference in self.differences],
            },
        }

    def text(self, expected: str) -> str:
        """Say it as `trainfw check` prints it; `expected` is the version of neuronx-cc in the SDK checked for."""
        parts = [str(finding) for outcome in self.outcomes.values() for finding in outcome.findings]
        width = max(map(len, self.outcomes))
        verdict = "clean" if self.passed else "refused"
        if not self.passed and not any(outcome.verdict == "refused" for outcome in self.outcomes.values()):
            verdict = "failed"
        lines = [f"{name:{width}}  {outcome}" for name, outcome in self.outcomes.items()]
        if not self.version.startswith(expected):
            lines.append(f"(the SDK that was checked for has neuronx-cc {expected})")
        parts.append("\n".join([f"neuronx-cc {self.version}", *(f"    {line}" for line in lines)]))
        if self.differences:
            parts.append("\n".join(["where they differ", *map(str, self.differences)]).replace("\n", "\n    "))
        silent = sorted(n for n, outcome in self.outcomes.items() if outcome.verdict not in ("passed", "refused"))
        said = [f"no verdict on {', '.join(silent)}"] if silent else []
        if self.differences:
            said.append(f"{len(self.differences)} difference{'s' * (len(self.differences) > 1)} from what check says")
        parts.append(f"{verdict}: neuronx-cc, {', '.join(said) or 'which agrees with check'}")
        return "\n\n".join(parts)


def compare_with_compiler(
    program: Program, flags: list[str], timeout: float, report: Report, progress: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Compile the steps of a `trainfw.Program` with the neuronx-cc on PATH, and compare that with a check of them.

    Args:
        flags: of the compiler, as `trainfw.backends.compiler_flags` gives them.
        timeout: seconds, of each compile.

    Raises UserError where there is no compiler. A signal ends it: see `run_compiler`.
    """
    compiler = find_compiler()
    version = compiler_version(compiler)
    modules = export_steps(program, progress)
    backends.release_freed_memory()
    protos = {name: module.proto for name, module in modules.items() if not isinstance(module, str)}
    free = backends.free_memory()
    at_once = compiles_at_once(len(protos), free)
    progress(
        f"neuronx-cc {version}: {at_once} at once ({free / 2**30:.1f} GiB free; a compile may take "
        f"{GIB_EACH}), {timeout:,.0f} s each at most"
    )
    runs = run_compiler(compiler, protos, flags, timeout=timeout, at_once=at_once, progress=progress)
    outcomes: dict[str, Outcome] = {}
    for name, module in modules.items():
        if isinstance(module, str):
            why = f"there is no module to compile: {module}"
            outcomes[name] = Outcome("not compiled", (CompilerFinding("compiler-failed", why, name),))
            continue
        broken = [finding.rule for finding in _own(report, name)]
        outcomes[name] = read_run(name, runs[name], module.module, version=version, timeout=timeout, found=broken)
    return Comparison(version, flags, report, modules, outcomes)


def scrubbed(text: str) -> str:
    """Drop paths from a text, but for the names of files, and the names of this user, this host and EC2's."""

    def without_directories(word: re.Match[str]) -> str:
        return word[0] if _NO_PATH.fullmatch(word[0]) else f"<path>/{word[0].rstrip('/').rpartition('/')[2]}"

    text = _INSTANCE.sub("<host>", _SLASHED.sub(without_directories, text))
    user = ""
    with contextlib.suppress(KeyError, OSError, ImportError):  # no such user in a container
        user = getpass.getuser()
    for name, instead in ((socket.gethostname(), "<host>"), (user, "<user>")):
        if len(name) > 2:
            text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", instead, text)
    return text


def _function(report: Report, name: str, outcome: Outcome) -> dict[str, object]:
    own = _own(report, name)
    refused = any(finding.severity == "error" for finding in own)
    return {
        "check": {
            "verdict": "refused" if refused else "clean",
            "findings": [_finding(finding, finding.severity) for finding in own],
        },
        "compiler": {
            "verdict": outcome.verdict,
            "exit_code": outcome.run.code if outcome.run else None,
            "seconds": round(outcome.run.seconds, 1) if outcome.run else None,
            "findings": [_finding(finding, "error") | {"code": finding.code or None} for finding in outcome.findings],
            "messages": [
                {"code": m.code, "severity": "error" if m.error else "warning", "text": scrubbed(m.text)}
                for m in outcome.messages
            ],
            "last_lines": [scrubbed(line) for line in last_lines(outcome.run)] if outcome.run else [],
        },
    }


def _finding(finding: Finding | CompilerFinding, severity: str) -> dict[str, object]:
    place = f"{Path(finding.place.file).name}:{finding.place.line}" if finding.place else None
    return {
        "rule": finding.rule,
        "severity": severity,
        "message": scrubbed(finding.message),
        "place": place,
        "op_name": finding.op_name or None,
    }


def _instructions(module: Exported | str, finding: Finding) -> list[str]:
    """Find the instructions of a finding of `check`: those at its place and of its name."""
    if isinstance(module, str) or not (finding.op_name or finding.place):
        return []
    everything = (i for computation in module.module.computations.values() for i in computation.instructions.values())
    wanted = finding.op_name, finding.place
    return [i.name for i in everything if wanted == (finding.op_name and i.op_name, finding.place and i.place)]


def _excerpt(module: Exported | str, names: list[str]) -> tuple[str, ...]:
    if isinstance(module, str) or not any(names):
        return ()
    lines = (line for line in module.text.splitlines() if (match := _LINE.match(line)) and match[1] in names)

    def short(line: str) -> str:
        bare = re.sub(r", (?:metadata|backend_config|frontend_attributes|sharding)=\{.*", "", line.strip())
        return scrubbed(bare if len(bare) <= _MOST_LETTERS else f"{bare[: _MOST_LETTERS - 3]}...")

    return tuple(map(short, itertools.islice(lines, _MOST_LINES)))


def _keys(recipe: Recipe) -> Iterator[tuple[str, object]]:
    """List keys of the sections that shape the program, where the value is a number, a switch or a plain word."""
    tree = recipe.model_dump(mode="json")
    tree["data"] = {key: tree["data"].get(key) for key in _OF_DATA}

    def plain(value: object) -> bool:
        return isinstance(value, bool | int | float) or (isinstance(value, str) and bool(_PLAIN.fullmatch(value)))

    def walk(key: str, value: object) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in _NOT_SENT:
                    yield from walk(f"{key}.{name}", inner)
        elif value != [] and all(map(plain, value if isinstance(value, list) else [value])):
            yield key, value

    for section in (*_SECTIONS, "data"):
        yield from walk(section, tree.get(section) or {})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a clone, put on the path
        return "unknown"
