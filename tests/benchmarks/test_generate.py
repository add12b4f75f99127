"""What `benchmarks/generate.py` makes of arguments and of numbers. No text is written here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "generate.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_generate", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(bench, monkeypatch, capsys):
    """`run(ms a step by peer, *arguments)` -> (exit code, what was printed), where these would have been measured."""

    def run(steps, *arguments, tokens=None):
        def of(name, rows):
            written = [[1, 2, 3]] * rows if tokens is None else tokens[name][:rows]
            return bench.Measured([0.5] * 3, [0.5 + 63 * ms / 1e3 for ms in (steps[name], steps[name], 99.0)], written)

        measured = {name: {rows: of(name, rows) for rows in (1, 8)} for name in steps}
        results = bench.Results(128, 64, 538_000_000, 30e9, measured)
        monkeypatch.setattr(bench, "measure", lambda chosen, say: results)
        code = bench.main(list(arguments))
        return code, capsys.readouterr().out

    return run


def test_all_is_well(run):
    code, said = run({"trainfw": 20.0, "transformers": 31.0, "transformers-compile": 25.0})
    assert code == 0
    assert "all checks met" in said
    assert [line.split()[-3] for line in said.splitlines() if line.startswith("transformers")] == [
        "1.55",
        "1.25",
        "1.55",
        "1.25",
    ]
    assert "26.9" in said  # GB/s: 538 MB in 20 ms


def test_a_missed_ratio_exits_1(run):
    code, said = run({"trainfw": 20.0, "transformers": 29.5})
    assert code == 1
    assert "8 rows: trainfw decodes 1.48 times as fast, not 1.5" in said
    assert said.endswith("2 checks missed\n")


def test_other_tokens_exit_1(run):
    tokens = {"trainfw": [[1, 2, 3]] * 8, "transformers": [[1, 2, 3]] * 7 + [[1, 2, 4]]}
    code, said = run({"trainfw": 20.0, "transformers": 40.0}, tokens=tokens)
    assert code == 1
    assert "8 rows: after prompt 7 trainfw writes another token 2" in said


def test_alone_nothing_is_checked(run):
    assert run({"trainfw": 20.0})[0] == 0
    assert run({"transformers": 20.0, "transformers-compile": 10.0})[0] == 0


def test_what_is_written(bench, run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "generate.md")
    file = tmp_path / "all.json"
    code, said = run({"trainfw": 20.0, "transformers": 29.5}, "--json", str(file), "--save")
    assert code == 1
    found = json.loads(file.read_text())
    assert found["peers"]["trainfw"]["8"]["decode_tokens_per_second"] == pytest.approx(400)
    assert len(found["problems"]) == 2
    page = (tmp_path / "generate.md").read_text()
    assert said.strip() in page
    assert "`python benchmarks/generate.py`" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "1,x"], "x: expected a positive number"),
        (["--rows", "0"], "0: expected a positive number"),
        (["--tokens", "1"], "expected at least 2"),
        (["--peers", "trainfw,vllm"], "unknown peer 'vllm'"),
        (["--json", "/no/such/directory/file"], "the directory does not exist"),
    ],
)
def test_bad_arguments_exit_2(bench, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
