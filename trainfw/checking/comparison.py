from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from trainfw import backends
from trainfw.checking.compiler import (
    GIB_EACH,
    compiler_version,
    compiles_at_once,
    export_steps,
    find_compiler,
    free_memory,
    run_compiler,
)
from trainfw.checking.compiler_output import Outcome, no_module, read_run
from trainfw.checking.differences import difference_report, find_differences
from trainfw.checking.report import Report
from trainfw.hlo import Exported

if TYPE_CHECKING:
    from trainfw.program import Program
    from trainfw.recipe import Recipe


class Comparison:
    """Verdicts of neuronx-cc on a recipe's steps, beside those of `check`."""

    def __init__(
        self,
        version: str,
        flags: list[str],
        report: Report,
        modules: dict[str, Exported | str],
        outcomes: dict[str, Outcome],
    ) -> None:
        self._version, self._flags, self._report = version, flags, report
        self._modules, self._outcomes = modules, outcomes
        self._differences = find_differences(report, outcomes, modules)
        self.passed = all(outcome.verdict == "passed" for outcome in outcomes.values())

    def difference_report(self, recipe: Recipe) -> dict[str, object]:
        """Give what `trainfw check --report-difference` writes."""
        return difference_report(
            recipe, self._report, self._outcomes, self._modules, version=self._version, flags=self._flags
        )

    def to_json(self) -> dict[str, object]:
        """Give plain data, which `trainfw check --compiler --json` adds to the report's, whose `ok` it replaces."""
        return {
            "ok": self._report.ok and self.passed,
            "compiler": {
                "version": self._version,
                "flags": self._flags,
                "ok": self.passed,
                "verdicts": {name: outcome.verdict for name, outcome in self._outcomes.items()},
                "findings": [f.to_json() for outcome in self._outcomes.values() for f in outcome.findings],
                "differences": [asdict(difference) for difference in self._differences],
            },
        }

    def text(self, expected: str) -> str:
        """Say it as `trainfw check` prints it; `expected` is the version of neuronx-cc in the SDK checked for."""
        parts = [str(finding) for outcome in self._outcomes.values() for finding in outcome.findings]
        width = max(map(len, self._outcomes))
        verdict = "clean" if self.passed else "refused"
        if not self.passed and not any(outcome.verdict == "refused" for outcome in self._outcomes.values()):
            verdict = "failed"
        lines = [f"{name:{width}}  {outcome}" for name, outcome in self._outcomes.items()]
        if not self._version.startswith(expected):
            lines.append(f"(the SDK that was checked for has neuronx-cc {expected})")
        parts.append("\n".join([f"neuronx-cc {self._version}", *(f"    {line}" for line in lines)]))
        if self._differences:
            parts.append("where they differ\n" + "\n".join(f"    {d}" for d in map(_indented, self._differences)))
        parts.append(f"{verdict}: neuronx-cc, {self._agreement()}")
        return "\n\n".join(parts)

    def _agreement(self) -> str:
        silent = sorted(n for n, outcome in self._outcomes.items() if outcome.verdict not in ("passed", "refused"))
        said = [f"no verdict on {', '.join(silent)}"] if silent else []
        if self._differences:
            said.append(f"{len(self._differences)} difference{'s' * (len(self._differences) > 1)} from what check says")
        return ", ".join(said) or "which agrees with check"


def _indented(text: object) -> str:
    return str(text).replace("\n", "\n    ")


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
    free = free_memory()
    at_once = compiles_at_once(len(protos), free)
    progress(
        f"neuronx-cc {version}: {at_once} at once ({free / 2**30:.1f} GiB free; a compile may take "
        f"{GIB_EACH}), {timeout:,.0f} s each at most"
    )
    runs = run_compiler(compiler, protos, flags, timeout=timeout, at_once=at_once, progress=progress)
    outcomes: dict[str, Outcome] = {}
    for name, module in modules.items():
        if isinstance(module, str):
            outcomes[name] = no_module(name, module)
            continue
        broken = [finding.rule for finding in report.findings if name in finding.programs]
        outcomes[name] = read_run(name, runs[name], module.module, version=version, timeout=timeout, found=broken)
    return Comparison(version, flags, report, modules, outcomes)
