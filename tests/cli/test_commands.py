"""The commands, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.helpers import write_recipe
from trainfw.backends import load_sdk


def trainfw(*arguments: str, code: int = 0, cwd=None) -> str:
    result = subprocess.run([sys.executable, "-m", "trainfw", *arguments], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == code, result.stderr
    return result.stdout


def test_launch_local_hands_on_what_is_accepted(tmp_path, monkeypatch):
    import trainfw.launch
    from trainfw.cli import main

    commands: list[list[str]] = []
    monkeypatch.setattr(trainfw.launch, "launch_local", lambda command, *_: commands.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["trainfw", "launch", "local", "quickstart", "train.steps=5", "--accept", "train"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert commands[0][-2:] == ["--accept", "train"]


def test_train_generate_and_eval(tmp_path):
    recipe = str(write_recipe(tmp_path))
    run = str(tmp_path / "runs" / "tiny")
    output = trainfw("train", recipe, "train.steps=4", "--devices", "2", cwd=tmp_path)
    assert "on 2 cpu devices (cpu), layout fsdp(2)" in output
    assert "step 4/4" in output
    text = trainfw("generate", run, "--prompt", "word", "--max-tokens", "8", "--top-k", "5", "--top-p", "0.9")
    assert text.startswith("word")
    none = [sys.executable, "-m", "trainfw", "generate", run, "--prompt", "word", "--max-tokens", "0"]
    done = subprocess.run(none, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: max_tokens = 0")
    assert "bits per byte" in trainfw("eval", run)


@pytest.mark.long
def test_train_as_neuron_gives_the_same_losses(tmp_path):
    recipe = str(write_recipe(tmp_path))
    chip = ["hardware.topology=trn2.3xlarge", "train.steps=4", "--devices", "4"]
    trainfw("train", recipe, "name=plain", *chip, cwd=tmp_path)
    output = trainfw("train", recipe, "name=neuron", "--as", "neuron", *chip, cwd=tmp_path)
    assert "(cpu), as neuron, layout" in output
    assert "check: clean: 0 errors, 0 warnings" in output
    plain, neuron = (metrics(tmp_path / "runs" / name) for name in ("plain", "neuron"))
    assert len(plain) == 4 + 2
    for a, b in zip(plain, neuron, strict=True):
        for key in ("loss", "validation_loss", "grad_norm"):
            assert (key in a) == (key in b)
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-5)


def test_train_as_neuron_needs_to_know_how_devices_are_joined(tmp_path):
    recipe = str(write_recipe(tmp_path))
    command = [sys.executable, "-m", "trainfw", "train", recipe, "--as", "neuron", "--devices", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "hardware.topology" in result.stderr
    assert "trn2.3xlarge has 4 cores" in result.stderr
    assert not (tmp_path / "runs").exists()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_doctor():
    output = trainfw("doctor", "--devices", "3")
    assert "devices            3 (cpu)" in output
    assert "has not run on Neuron hardware" in output
    newest = load_sdk().jax[1]
    assert (f"jax {jax.__version__} is outside" in output) == (jax.__version__ != newest)
    assert ("; there `pip install " in output) == (jax.__version__ != newest)


def test_tokenizer_train_writes_what_a_recipe_reads(tmp_path):
    recipe = str(write_recipe(tmp_path))
    tokenizer = str(tmp_path / "tokenizer")
    output = trainfw("tokenizer", "train", str(tmp_path / "text" / "*.txt"), "--vocab-size", "280", "--out", tokenizer)
    assert output.endswith("280 entries\n")
    spec = f"data.tokenizer={{name: file, path: {tokenizer}}}"
    assert "name: file" in trainfw("recipe", "show", recipe, spec)
