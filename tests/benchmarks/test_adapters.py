"""What `benchmarks/adapters.py` makes of arguments and of numbers. Nothing is trained here."""

from __future__ import annotations

import json
import re
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

    def run(peers, *arguments, losses=None, last=None):
        measured = {}
        for name, (seconds, peak) in peers.items():
            first, end = (losses or {}).get(name, 4.25), (last or {}).get(name, 4.0)
            peaks = {"imported": 10**8, "built": 5 * 10**8, "trained": int(peak)}
            measured[name] = bench.Measured([seconds, seconds, 9.0], [first, end], 4_884_480, peaks)
        monkeypatch.setattr(
            bench, "measure", lambda chosen: bench.Results(2, 512, 16, measured, {"": 0.9, "-bf16": 0.4})
        )
        code = bench.main(list(arguments))
        return code, "".join(capsys.readouterr())

    return run


def test_all_is_well(run):
    code, said = run(GOOD)
    assert code == 0
    assert "missed" not in said
    assert re.findall(r"times as fast as PEFT +\| +([0-9.]+)", said) == ["1.60", "1.60"]
    assert re.findall(r"peak memory over PEFT's +\| +([0-9.]+)", said) == ["0.571", "0.562"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainfw": (1.2, 1.2e9)}, r"trainfw: times as fast as PEFT +\| +1.33 \| at least 1.50 .*missed"),
        ({"trainfw-bf16": (0.6, 0.9e9)}, r"trainfw-bf16: times as fast as PEFT +\| +1.33 \| at least 1.50 .*missed"),
        ({"trainfw": (1.0, 2e9)}, r"trainfw: peak memory over PEFT's +\| +0.952 \| at most 0.6 .*missed"),
        ({"trainfw-bf16": (0.5, 1.2e9)}, r"trainfw-bf16: peak memory over PEFT's +\| +0.75 \| at most 0.6 .*missed"),
    ],
)
def test_a_missed_check_exits_1(run, change, said):
    code, printed = run(GOOD | change)
    assert code == 1
    assert re.search(said, printed)
    assert printed.count("missed") == 1


def test_losses_that_differ_exit_1(run):
    assert run(GOOD, losses={"peft": 4.2501, "peft-bf16": 4.253})[0] == 0
    code, said = run(GOOD, losses={"peft": 4.26, "trainfw-bf16": 4.30})
    assert code == 1
    assert re.search(r"trainfw: the first loss, apart from PEFT's +\| +0.00235 .*missed", said)
    assert re.search(r"trainfw-bf16: the first loss.*missed", said)
    assert run(GOOD, losses={"trainfw": float("nan")})[0] == 1
    assert run(GOOD, last={"trainfw": 4.05})[0] == 0
    code, said = run(GOOD, last={"trainfw": 4.2})
    assert code == 1
    assert re.search(r"trainfw: the last loss, apart from PEFT's +\| +0.05 .*missed", said)


def test_alone_nothing_is_checked_and_that_is_said(run):
    for peers in ({"trainfw": (9.0, 9e9)}, {"trainfw": (9.0, 9e9), "peft-bf16": (1.0, 1e9)}):
        code, said = run(peers)
        assert code == 0
        assert "nothing was checked" in said


def test_what_is_written(run, tmp_path):
    assert run(GOOD, "--json", str(tmp_path / "all.json"))[0] == 0
    rows = json.loads((tmp_path / "all.json").read_text())["tables"][0]["rows"]
    assert [row[:2] for row in rows] == [["trainfw", 1024], ["peft", 640], ["trainfw-bf16", 2048], ["peft-bf16", 1280]]
    assert rows[1][8] == 2100  # MB at the peak


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "0: expected a positive number"),
        (["--peers", "trainfw,unsloth"], "unknown peer 'unsloth'"),
        (["--train", "remat"], "--train remat: expected KEY=VALUE"),
        (["--train", "remat=dots,stps=3"], "train.stps = 3: unknown key; did you mean 'train.steps'?"),
        (["--json", "/"], "/: is a directory; expected a file"),
        (["--json", "/no/such/directory/file"], "the directory does not exist"),
    ],
)
def test_bad_arguments_exit_2(bench, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
