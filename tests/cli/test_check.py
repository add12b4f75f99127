"""`trainfw check`, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
    assert all(rule in text and RULES[rule].source in text for rule in RULES)
    assert in_process(monkeypatch, "check", "--rules", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {rule["id"]: rule["severity"] for rule in listed} == {r.id: r.severity for r in RULES.values()}


BAD_INPUT = {
    "no recipe": ([], "expected a RECIPE (or --rules)"),
    "no hardware": (["RECIPE"], "hardware.topology = null: nothing to check for; name it with --hardware: cpu"),
    "unknown hardware": (["RECIPE", "--hardware", "trn2.48"], "did you mean 'trn2.48xlarge'"),
    "too many cores": (["RECIPE", "--hardware", "trn2-ultraserver", "--count", "9"], "try --count 8"),
    "count without hardware": (["RECIPE", "--count", "2"], "needs hardware.topology"),
    "count of nothing": (["RECIPE", "--hardware", "trn2.48xlarge", "--count", "0"], "hardware.count = 0"),
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


@pytest.mark.slow
@pytest.mark.long
def test_a_recipe_for_64_cores(tmp_path):
    recipe = write_recipe(tmp_path, model=MODEL, data={"source": ["nowhere/*.txt"]}, train={"global_batch_size": 16})
    arguments = [str(recipe), "parallel.tensor=4", "--hardware", "trn2.48xlarge"]
    result = trainfw("check", *arguments)
    assert "partitioning train_step for 64 cores" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("clean: 0 errors, 0 warnings")
    report = json.loads(trainfw("check", *arguments, "--json").stdout)
    assert report["ok"]
    assert report["cores"] == 64
    assert ["tensor"] in [row["axes"] for row in report["collectives"]]


@pytest.mark.slow
def test_muon_and_remat_on_a_mesh(tmp_path):
    recipe = write_recipe(tmp_path, model=MODEL, train={"global_batch_size": 16, "remat": "dots"})
    result = trainfw("check", str(recipe), "parallel.tensor=4", "optimizer.name=muon", "--hardware", "trn2.48xlarge")
    assert result.stdout.splitlines()[-1].startswith("clean: 0 errors, 0 warnings")
    assert "note: op-reduce-precision-noop" in result.stdout


@pytest.mark.slow
def test_a_recipe_that_does_not_fit(tmp_path):
    recipe = write_recipe(tmp_path, model=MODEL | {"num_layers": 4, "intermediate_size": 2**24})
    result = trainfw("check", str(recipe), "hardware.topology=trn2.3xlarge", "--json", code=1)
    errors = [f["rule"] for f in json.loads(result.stdout)["findings"] if f["severity"] == "error"]
    assert "memory-arguments" in errors


def test_hardware_without_neurons_rules(tmp_path):
    recipe = write_recipe(tmp_path)
    result = trainfw("check", str(recipe), "--hardware", "h100-8")
    assert "Neuron's rules do not apply to this hardware" in result.stdout
