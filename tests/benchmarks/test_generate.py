"""What `benchmarks/generate.py` makes of arguments and of numbers. No text is written here."""

from __future__ import annotations

import importlib.util
import json
import re
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
        monkeypatch.setattr(bench, "measure", lambda chosen: results)
        code = bench.main(list(arguments))
        return code, "".join(capsys.readouterr())

    return run


def test_all_is_well(run):
    code, said = run({"trainfw": 20.0, "transformers": 31.0, "transformers-compile": 25.0})
    assert code == 0
    assert "missed" not in said
    assert [line.split()[-6] for line in said.splitlines() if line.startswith("| transformers")] == [
        "1.55",
        "1.25",
        "1.55",
        "1.25",
    ]
    assert "26.9" in said  # GB/s: 538 MB in 20 ms


def test_a_missed_ratio_exits_1(run):
    code, said = run({"trainfw": 20.0, "transformers": 29.5, "transformers-compile": 25.0})
    assert code == 1
    assert re.search(r"8 rows: decoding, times as fast as transformers +\| +1.48 \| at least 1.50 .*missed", said)
    assert said.count("missed") == 2


@pytest.mark.parametrize("peer", ["transformers", "transformers-compile"])
def test_other_tokens_exit_1(run, peer):
    tokens = dict.fromkeys(("trainfw", "transformers", "transformers-compile"), [[1, 2, 3]] * 8)
    tokens[peer] = [[1, 2, 3]] * 7 + [[1, 2, 4]]
    code, said = run(dict.fromkeys(tokens, 40.0) | {"trainfw": 20.0}, tokens=tokens)
    assert code == 1
    assert re.search(rf"8 rows: prompts after which {peer} writes other tokens +\| +1 .*missed", said)
    assert said.count("missed") == 1


def test_alone_nothing_is_checked_and_that_is_said(run):
    for peers in ({"trainfw": 20.0}, {"transformers": 20.0, "transformers-compile": 10.0}):
        code, said = run(peers)
        assert code == 0
        assert "nothing was checked" in said


def test_what_is_written(run, tmp_path):
    file = tmp_path / "all.json"
    assert run({"trainfw": 20.0, "transformers": 29.5}, "--json", str(file))[0] == 1
    found = json.loads(file.read_text())
    assert found["tables"][0]["rows"][2][5] == pytest.approx(400)  # tokens/s of trainfw with 8 rows
    assert [check["ok"] for check in found["checks"]] == [False, True, False, True]


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
