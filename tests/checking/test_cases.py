"""The tables of programs (cases/*.yaml): what a check says of each, on each chip and with each SDK."""

from __future__ import annotations

import pytest

from tests.checking.cases import Row, _load, cases, rows
from trainfw.backends import load_sdk, sdk_versions
from trainfw.checking.rules import CHIPS, RULES, Target
from trainfw.errors import UserError

_ASIDE = {"sdk-version", "sdk-python", "memory-temporaries"}
"""Of the JAX that runs here, and of the CPU's compiler."""
_WHOLE = {"arguments-many", "instructions", "memory-arguments", "not-partitioned"}
"""Rules on a program as a whole."""
TARGETS = [(chip, lnc, sdk) for chip in CHIPS for lnc in (1, 2) for sdk in sdk_versions()]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_row(row: Row):
    assert row.sdks, "no SDK is within these bounds"
    for sdk, report in zip(row.sdks, row.reports(), strict=True):
        findings = [finding for finding in report.findings if finding.rule not in _ASIDE]
        said = {(finding.severity, finding.rule) for finding in findings}
        wanted = row.expected
        assert {found for found in said if found[0] != "note"} | (said & wanted) == wanted, f"SDK {sdk}:\n{report}"
        assert report.ok == (row.verdict != "error")
        for finding in findings:
            if finding.rule not in _WHOLE and finding.severity != "note":
                assert finding.place is not None, finding
                assert (finding.place.file, finding.place.line) == (str(row.case.file), row.case.marked), finding


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_no_target_is_expected_of_twice(case):
    seen = set()
    for row in case.rows():
        for sdk in row.sdks:
            assert (row.chip, row.lnc, sdk) not in seen, f"{case.name}: {row.key}: SDK {sdk} on {row.chip} again"
            seen.add((row.chip, row.lnc, sdk))


def test_a_key_that_is_written_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("- program: x\n  source: a\n  expect: {all: clean}\n  expect: {all: error sort}\n")
    with pytest.raises(UserError, match=r"twice\.yaml:4: the key 'expect' is written twice"):
        list(_load(file))


def test_both_sides_of_every_border():
    said = {found for row in rows() for found in row.expected}
    near = {case.fields.get("near") for case in cases()}
    assert near - {None} <= set(RULES)
    for rule in RULES.values():
        if rule.id in _ASIDE:
            continue
        rulings = [
            rule.on(Target(chip, lnc, sdk, load_sdk(sdk).packages["libneuronxla"])) for chip, lnc, sdk in TARGETS
        ]
        for severity in {ruling.severity for ruling in rulings if ruling is not None}:
            assert (severity, rule.id) in said, f"{rule.id}: no program has it as {severity}"
        excepted = any(ruling is None for ruling in rulings)
        assert excepted or rule.id in near | _WHOLE, f"{rule.id}: no program nearly breaks it"


def test_the_tables_cover_chips_and_sdks():
    for chip in CHIPS:
        assert {row.verdict for row in rows() if row.chip == chip} >= {"clean", "warning", "error"}
    assert {sdk for row in rows() for sdk in row.sdks} == set(sdk_versions())
    assert len(rows()) >= 350
