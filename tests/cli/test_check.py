"""`trainfw check`, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.checking import stand_in
from tests.helpers import write_recipe
from trainfw.checking import RULES
from trainfw.cli import main

MODEL = {"preset": "tiny", "vocab_size": 512, "num_heads": 4, "num_kv_heads": 4, "num_layers": 2}


def trainfw(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, "-m", "trainfw", *arguments], capture_output=True, text=True)
    assert result.returncode == code, result.stderr + result.stdout
    return result


def in_process(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trainfw", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_rules(monkeypatch, capsys):
    assert in_process(monkeypatch, "check", "--rules") == 0
    text = capsys.readouterr().out
    assert all(rule.id in text and rule.source in " ".join(text.split()) for rule in RULES.values())
    assert "keyed on chip, SDK\n" in text
    assert max(map(len, text.splitlines())) <= 80
    assert in_process(monkeypatch, "check", "--rules", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {rule["id"]: rule["severity"] for rule in listed} == {r.id: r.severity for r in RULES.values()}
    assert next(rule["keyed_on"] for rule in listed if rule["id"] == "sort") == ["chip"]


BAD_INPUT = {
    "no recipe": ([], "expected a RECIPE (or --rules)"),
    "no hardware": (
        ["RECIPE"],
        "hardware.topology = null: nothing to check for; expected one of c7g.16xlarge, c8g.24xlarge, cpu",
    ),
    "unknown hardware": (["RECIPE", "--hardware", "trn2.48"], "did you mean 'trn2.48xlarge'"),
    "too many cores": (["RECIPE", "--hardware", "trn2-ultraserver", "--count", "9"], "try count=8"),
    "count without hardware": (["RECIPE", "--count", "2"], "needs hardware.topology"),
    "count of nothing": (["RECIPE", "--hardware", "trn2.48xlarge", "--count", "0"], "hardware.count = 0"),
    "no compiler": (["RECIPE", "--hardware", "trn2.3xlarge", "--compiler"], "no neuronx-cc on PATH; it runs on any"),
    "no Neuron hardware": (["RECIPE", "--hardware", "h100-8", "--compiler"], "compiles for Neuron hardware only"),
    "difference without compiler": (["RECIPE", "--report-difference", "x"], "give it with --compiler"),
    "limit of nothing": (["RECIPE", "--compiler", "--compiler-timeout", "0"], "--compiler-timeout 0: expected seconds"),
    "no directory": (["RECIPE", "--compiler", "--report-difference", "no/x"], "a directory that exists"),
    "unknown key": (["RECIPE", "parallel.tensr=4"], "did you mean 'parallel.tensor'?"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, tmp_path, monkeypatch, capsys):
    arguments, message = BAD_INPUT[name]
    recipe = str(write_recipe(tmp_path))
    code = in_process(monkeypatch, "check", *(recipe if a == "RECIPE" else a for a in arguments))
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert "Traceback" not in error


@pytest.mark.long
def test_a_recipe_for_64_cores(tmp_path):
    recipe = write_recipe(tmp_path, model=MODEL, data={"source": ["nowhere/*.txt"]}, train={"global_batch_size": 16})
    arguments = [str(recipe), "parallel.tensor=4", "--hardware", "trn2.48xlarge"]
    result = trainfw("check", *arguments)
    assert "partitioning train for 64 cores" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("clean: 0 errors, 0 warnings")
    report = json.loads(trainfw("check", *arguments, "--json").stdout)
    assert report["ok"]
    assert report["cores"] == 64
    assert ["tensor"] in [row["axes"] for row in report["collectives"]]


@pytest.mark.long
def test_muon_and_remat_on_a_mesh(tmp_path):
    recipe = write_recipe(tmp_path, model=MODEL, train={"global_batch_size": 16, "remat": "dots"})
    result = trainfw("check", str(recipe), "parallel.tensor=4", "optimizer.name=muon", "--hardware", "trn2.48xlarge")
    assert result.stdout.splitlines()[-1].startswith("clean: 0 errors, 0 warnings")
    assert "note: op-reduce-precision-noop" in result.stdout


@pytest.mark.long
def test_a_recipe_that_does_not_fit(tmp_path):
    recipe = write_recipe(tmp_path, model=MODEL | {"num_layers": 4, "intermediate_size": 2**24})
    result = trainfw("check", str(recipe), "hardware.topology=trn2.3xlarge", "--json", code=1)
    errors = [f["rule"] for f in json.loads(result.stdout)["findings"] if f["severity"] == "error"]
    assert "memory-arguments" in errors


def test_hardware_without_neurons_rules(tmp_path, monkeypatch, capsys):
    assert in_process(monkeypatch, "check", str(write_recipe(tmp_path)), "--hardware", "h100-8") == 0
    assert "Neuron's rules do not apply to this hardware" in capsys.readouterr().out


def checked_with(tmp_path, answer: str, code: int, *more: str) -> subprocess.CompletedProcess[str]:
    """`trainfw check --compiler`, with a stand-in for neuronx-cc that answers so."""
    environment = os.environ | stand_in.install(tmp_path / "bin", answer)
    command = ["check", str(write_recipe(tmp_path)), "--hardware", "trn2.3xlarge", "--compiler", *more]
    result = subprocess.run(
        [sys.executable, "-m", "trainfw", *command], env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr + result.stdout
    return result


@pytest.mark.long
def test_a_compiler_that_agrees(tmp_path):
    file = tmp_path / "differences.json"
    result = checked_with(tmp_path, "passed", 0, "--report-difference", str(file))
    assert "a compile may take 14), 3,600 s each at most" in result.stderr
    assert f"neuronx-cc {stand_in.VERSION}\n    train     passed after " in result.stdout
    assert result.stdout.splitlines()[-1] == "clean: neuronx-cc, which agrees with check"
    written = json.loads(file.read_text())
    assert written["differences"] == []
    assert {name: f["compiler"]["verdict"] for name, f in written["functions"].items()} == {
        "train": "passed",
        "evaluate": "passed",
    }
    assert str(tmp_path) not in file.read_text()


def test_a_compiler_that_refuses(tmp_path):
    result = checked_with(tmp_path, "train=refused,evaluate=out_of_memory", 1)
    assert "error: dtype-f8e4m3fn: " in result.stdout
    assert "train: NCC_EVRF051: the compiler refused it, and check has nothing of dtype-f8e4m3fn" in result.stdout
    assert "error: compiler-memory: evaluate as a whole" in result.stdout
    last = "refused: neuronx-cc, no verdict on evaluate, 3 differences from what check says"
    assert result.stdout.splitlines()[-1] == last


@pytest.mark.long
def test_a_compiler_that_hangs(tmp_path):
    result = checked_with(tmp_path, "train=passed,evaluate=hangs", 1, "--compiler-timeout", "3", "--json")
    assert json.loads(result.stdout)["ok"] is False
    found = json.loads(result.stdout)["compiler"]
    assert found["verdicts"] == {"train": "passed", "evaluate": "timed out"}
    assert [finding["rule"] for finding in found["findings"]] == ["compiler-timeout"]
    assert found["differences"] == []
