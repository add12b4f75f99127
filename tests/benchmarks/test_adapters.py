"""What `benchmarks/adapters.py` makes of arguments and of numbers. Nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import adapters
    finally:
        sys.path.remove(str(BENCHMARKS))
    return adapters


GOOD = {"trainfw": (1.0, 1.2e9), "peft": (1.6, 2.1e9), "trainfw-bf16": (0.5, 0.9e9), "peft-bf16": (0.8, 1.6e9)}


@pytest.fixture
def run(bench, monkeypatch, capsys):
    """`run({peer: (seconds a step, peak)}, *arguments)` -> (exit code, what was printed), as if these were measured."""

    def run(peers, *arguments, losses=None):
        measured = {}
        for name, (seconds, peak) in peers.items():
            first = (losses or {}).get(name, 4.25)
            peaks = {"imported": 10**8, "built": 5 * 10**8, "trained": int(peak)}
            measured[name] = bench.Measured([seconds, seconds, 9.0], [first, 4.0], 4_884_480, peaks)
        monkeypatch.setattr(bench, "measure", lambda chosen, say: bench.Results(2, 512, 16, measured))
        code = bench.main(list(arguments))
        return code, capsys.readouterr().out

    return run


def test_all_is_well(run):
    code, said = run(GOOD)
    assert code == 0
    assert "all checks met" in said
    assert [line.split() for line in said.splitlines() if line.startswith("ratio")] == [
        ["ratio", "1.60", "0.57"],
        ["ratio-bf16", "1.60", "0.56"],
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainfw": (1.2, 1.2e9)}, "trainfw trains 1.33 times as fast, not 1.5"),
        ({"trainfw-bf16": (0.5, 1.2e9)}, "trainfw-bf16's peak of memory is 0.75 of PEFT's, not 0.6"),
    ],
)
def test_a_missed_check_exits_1(run, change, said):
    code, printed = run(GOOD | change)
    assert code == 1
    assert said in printed
    assert printed.endswith("1 checks missed\n")


def test_losses_that_differ_exit_1(run):
    assert run(GOOD, losses={"peft": 4.2501, "peft-bf16": 4.253})[0] == 0
    code, said = run(GOOD, losses={"peft": 4.26, "trainfw-bf16": 4.30})
    assert code == 1
    assert "trainfw: the first losses are 4.250000 and 4.260000: 2.3e-03 apart" in said
    assert "trainfw-bf16: the first losses" in said
    assert run(GOOD, losses={"trainfw": float("nan")})[0] == 1


def test_alone_nothing_is_checked(run):
    assert run({"trainfw": (9.0, 9e9)})[0] == 0
    assert run({"trainfw": (9.0, 9e9), "peft-bf16": (1.0, 1e9)})[0] == 0


def test_what_is_written(bench, run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "adapters.md")
    code, said = run(GOOD, "--json", str(tmp_path / "all.json"), "--save")
    assert code == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["peers"]["trainfw"]["tokens_per_second"] == 1024
    assert found["peers"]["peft"]["peak"] == 2.1e9
    assert said.strip() in (tmp_path / "adapters.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "0: expected a positive number"),
        (["--peers", "trainfw,unsloth"], "unknown peer 'unsloth'"),
        (["--train", "remat"], "--train remat: expected KEY=VALUE"),
        (["--json", "/no/such/directory/file"], "the directory does not exist"),
    ],
)
def test_bad_arguments_exit_2(bench, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
