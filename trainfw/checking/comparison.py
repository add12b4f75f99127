from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from trainfw.checking.differences import Difference, difference_report, find_differences
from trainfw.checking.report import Report
from trainfw.hlo import Exported

if TYPE_CHECKING:
    from trainfw.program import Program
    from trainfw.recipe import Recipe


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
        return find_differences(self.report, self.outcomes, self.modules)

    @property
    def passed(self) -> bool:
        return all(outcome.verdict == "passed" for outcome in self.outcomes.values())

    def difference_report(self, recipe: Recipe) -> dict[str, object]:
        """Give what `trainfw check --report-difference` writes."""
        said = self.report, self.outcomes, self.modules
        return difference_report(recipe, *said, version=self.version, flags=self.flags)

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
        parts.append(f"{verdict}: neuronx-cc, {self._agreement()}")
        return "\n\n".join(parts)

    def _agreement(self) -> str:
        silent = sorted(n for n, outcome in self.outcomes.items() if outcome.verdict not in ("passed", "refused"))
        said = [f"no verdict on {', '.join(silent)}"] if silent else []
        if self.differences:
            said.append(f"{len(self.differences)} difference{'s' * (len(self.differences) > 1)} from what check says")
        return ", ".join(said) or "which agrees with check"


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
