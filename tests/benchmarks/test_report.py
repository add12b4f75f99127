from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, reporting

REPORT = Path(report.__file__)


def finish(*checks, **options):
    arguments = argparse.Namespace(**({"json": None, "save": False} | options))
    made = reporting.table("Speeds", ["what", "GB/s"], [["copy", 12.345], ["read", None]])
    return reporting.finish("made-up", [made], checks, arguments)


def test_a_missed_check_is_exit_code_1():
    assert finish(reporting.at_most("seconds", 2.0, 2.0)) == 0
    assert finish(reporting.at_most("seconds", 2.1, 2.0)) == 1
    assert finish(reporting.at_least("times", 20.0, 20.0), reporting.at_least("rows", 1, 2)) == 1


def test_the_page_is_of_the_results_that_are_there():
    assert (reporting.RESULTS / "report.md").read_text() == report.page(reporting.RESULTS)


def test_results_are_written_and_make_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["made_up.py", "--rounds", "2", "--json", str(tmp_path / "x"), "--save"])
    finish(reporting.at_most("seconds", 3.0, 2.0), save=True)
    result = json.loads((tmp_path / "made-up.json").read_text())
    assert result.keys() == report.KEYS
    assert result["command"] == "python benchmarks/made-up.py --rounds 2"
    assert result["machine"]["cores"] >= 1
    assert "jax" in result["versions"]
    page = report.page(tmp_path)
    assert "0 of 1 checks hold; missed: made-up: seconds." in page
    assert "| copy | 12.3 |" in page
    assert "| read |    - |" in page


def test_the_page_is_compared(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, str(REPORT), *arguments], capture_output=True, text=True)

    where = ("--results", str(tmp_path))
    empty = run(*where)
    assert empty.returncode == 2
    assert "has no results" in empty.stderr
    (tmp_path / "one.json").write_text(json.dumps({key: [] for key in report.KEYS} | {"machine": {}, "versions": {}}))
    assert run(*where, "--check").returncode == 1
    assert run(*where).returncode == 0
    assert run(*where, "--check").returncode == 0
    (tmp_path / "bad.json").write_text("{}")
    bad = run(*where)
    assert bad.returncode == 2
    assert "bad.json" in bad.stderr
    assert run("--results", str(tmp_path / "none")).returncode == 2


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123"), (0.0, "0.00")]
)
def test_figures_have_the_digits_they_are_good_for(value, shown):
    assert reporting.show(value) == shown
