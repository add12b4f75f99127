"""Small programs: each of BREAKS breaks one rule, each of LEGAL stays just inside one (see programs.py)."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import jax
import pytest

from tests.checking.programs import BREAKS, LEGAL, WARNS, Program
from trainfw.checking import RULES, Report, check


def run(program: Program) -> Report:
    with jax.enable_x64(True) if program.x64 else contextlib.nullcontext():
        return check(program.fn, *program.args, **program.options)


def marked_line(fn: Any) -> tuple[str, int]:
    lines, first = inspect.getsourcelines(fn)
    (line,) = [first + i for i, text in enumerate(lines) if "# here" in text]
    return inspect.getsourcefile(fn) or "", line


@pytest.mark.parametrize("name", BREAKS)
def test_one_broken_rule_is_one_finding(name):
    program = BREAKS[name]
    report = run(program)
    assert [finding.rule for finding in report.errors] == [program.rule], report
    assert not report.ok
    place = report.errors[0].place
    assert place is not None
    assert (place.file, place.line) == marked_line(program.fn)
    explained = {"not-partitioned"} if program.rule == "control-checkify" else set()  # JAX lowers it for no device
    assert {warning.rule for warning in report.warnings} == explained, report


@pytest.mark.parametrize("name", LEGAL)
def test_legal_programs_are_clean(name):
    report = run(LEGAL[name])
    assert report.ok
    assert not report.warnings, report


@pytest.mark.parametrize("name", WARNS)
def test_one_warning(name):
    program = WARNS[name]
    report = run(program)
    assert report.ok, report
    (warning,) = [finding for finding in report.warnings if finding.rule != "memory-temporaries"]
    assert warning.rule == program.rule
    assert warning.place is not None
    assert (warning.place.file, warning.place.line) == marked_line(program.fn)


def test_the_tables_cover_the_rules():
    by_severity = {s: {name for name, rule in RULES.items() if rule.severity == s} for s in ("error", "warning")}
    # Memory, and what could be compiled at all, is of the program as a whole (see test_report.py).
    assert {program.rule for program in BREAKS.values()} == by_severity["error"] - {"memory-arguments"}
    assert {program.rule for program in WARNS.values()} == by_severity["warning"] - {
        "memory-temporaries",
        "not-partitioned",
    }
    assert {program.rule for program in LEGAL.values()} <= set(RULES)
    assert len(BREAKS) >= 25
    assert len(LEGAL) >= 15
