"""Sweeps of real runs, and what is said of them."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

import trainfw
from tests.helpers import write_recipe
from trainfw import UserError
from trainfw.cli import main
from trainfw.launch import SlurmJob
from trainfw.sweeping import Sweep, array_of, make_runs
from trainfw.sweeping.result import RunResult

RATES = "optimizer.learning_rate=3e-3,1e25"


def command(recipe, *arguments):
    ran = subprocess.run(
        [sys.executable, "-m", "trainfw", "sweep", str(recipe), *arguments],
        capture_output=True,
        text=True,
        cwd=recipe.parent,
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of which one run fails."""
    recipe = write_recipe(tmp_path_factory.mktemp("sweep"), train={"steps": 3})
    return recipe, *command(recipe, RATES)


def test_a_run_that_fails_is_listed_and_does_not_end_the_sweep(swept):
    recipe, code, said, _ = swept
    assert code == 1
    assert re.search(r"1 of 2 runs are done\n.*\n +0\.003 +\d\.\d+ .*best\n +1e\+25 +- .*failed: step \d: ", said)
    assert max(map(len, said.splitlines()[:4])) <= 80
    found = json.loads((recipe.parent / "runs/tiny-sweep/sweep.json").read_text())
    assert found["best"] == "learning_rate=0.003"
    assert [run["problem"] is None for run in found["runs"]] == [True, False]
    ET.parse(recipe.parent / "runs/tiny-sweep/sweep.svg")


def test_what_is_done_is_read_and_not_made_again(swept, monkeypatch):
    recipe, *_ = swept
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr("trainfw.sweeping.runner.launch_local", None)
    found = trainfw.sweep(recipe, {"optimizer.learning_rate": [3e-3]})
    assert found.results[0].finished
    assert (
        found.best.loss
        == json.loads((recipe.parent / "runs/tiny-sweep/sweep.json").read_text())["runs"][0]["validation_loss"]
    )
    with pytest.raises(UserError, match="all 1 runs are done"):
        array_of(make_runs(recipe, {"optimizer.learning_rate": [3e-3]}))


def test_another_value_of_a_fixed_key_is_refused_before_anything_starts(swept):
    recipe, *_ = swept
    code, _, error = command(recipe, RATES, "train.seed=5")
    assert code == 2
    assert "train.seed: 0 there, 5 here (command line): cannot change in a run" in error
    code, _, error = command(recipe, "train.seed=1,2", "train.validation_batches=0", "--json")
    assert code == 2
    assert "a sweep compares validation losses" in error
    assert not (recipe.parent / "runs/tiny-sweep/seed=1").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--isoflop", "1e11,x,2"], "--isoflop 1e11,x,2: expected numbers above zero"),
        (["--isoflop", "1e11,2e11,-1"], "expected numbers above zero"),
        (["--isoflop", "1e11,2e11", "train.seed=1"], "expected 3 budgets"),
        (["--isoflop", "1e11,2e11,3e11", "train.seed=1,2"], "--isoflop: goes without train.seed=A,B"),
        (["--isoflop", "1e11,2e11,3e11", "--slurm"], "--isoflop: goes without --slurm"),
        (["train.seed=1,2", "--widths", "64"], "--widths goes with --isoflop"),
        (["train.seed=1,2", "--dry-run"], "--dry-run goes with --slurm"),
        (["train.seed=1,2", "--sbatch=--exclude=a"], "--sbatch goes with --slurm"),
    ],
)
def test_options_that_do_not_go_together(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainfw", "sweep", "quickstart", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_slurm_array_has_a_task_for_each_run(swept, monkeypatch):
    recipe, *_ = swept
    monkeypatch.chdir(recipe.parent)
    runs = make_runs(recipe, {"optimizer.learning_rate": [3e-3, 1e-3, 0.1]})
    script = array_of(runs, functools.partial(SlurmJob, time="30"), at_once=1).script()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --array=0-1%1" in script  # one of them is done
    which = re.search(r"(?s)(case \$SLURM_ARRAY_TASK_ID in.*?esac)", script)[1]
    shown = subprocess.run(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID=1\n{which}\nprintf "%s\\n" "$logs" "${{run[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[0] == "runs/tiny-sweep/learning_rate=0.1/logs"
    assert shown[shown.index("train") + 1 :] == [str(runs[2].recipe_file), "--run-dir", str(runs[2].path)]
    assert trainfw.load_recipe(runs[2].recipe_file) == runs[2].recipe
    with pytest.raises(UserError, match="--at-once 0"):
        array_of(runs, at_once=0)


def results(values, losses):
    runs = make_runs("quickstart", values)
    return Sweep(runs[0].path.parent, [RunResult(run, 250, loss, 61.0) for run, loss in zip(runs, losses, strict=True)])


def test_losses_of_other_things_are_no_comparison():
    values = {"data.tokenizer.vocab_size": [300, 400], "train.seed": [0, 1]}
    found = results(values, [2.0, 1.0, 3.0, 4.0])
    assert found.best is found.results[1]
    others = [replace(result, measured=str(i), bits_per_byte=9.0 - i) for i, result in enumerate(found.results)]
    by_bits = Sweep(found.directory, others)
    assert by_bits.best is others[3]
    assert "bits/byte" in str(by_bits)
    other_text = Sweep(found.directory, [replace(result, measured=str(i)) for i, result in enumerate(found.results)])
    assert other_text.best is None
    assert "none is marked as the best" in str(other_text)


def test_a_best_value_at_an_end_is_pointed_out():
    rates = {"optimizer.learning_rate": [0.1, 0.01, 0.001]}
    assert "a better one may lie beyond" in str(results(rates, [1.0, 2.0, 3.0]))
    assert "a better one may lie beyond" not in str(results(rates, [2.0, 1.0, 3.0]))
    assert "a better one may lie beyond" not in str(results(rates, [1.0, None, 3.0]))


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer.learning_rate": [0.1, 0.01], "optimizer.name": ["adamw", "lion"]},
        {"optimizer.name": ["adamw", "lion"], "data.shuffle": [True, False]},
        {"model.num_layers": [1, 2, 3, 4]},
    ],
)
def test_drawings_are_well_formed(values):
    drawn = results(values, [1.0, 2.0, 1.5, 1.2]).to_svg()
    assert len(ET.fromstring(drawn).findall(".//{http://www.w3.org/2000/svg}circle")) == 4


@pytest.mark.long
def test_stopped_in_a_run_the_same_command_goes_on(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 300}, checkpoint={"every": 100})
    process = subprocess.Popen(
        [sys.executable, "-m", "trainfw", "sweep", str(recipe), "train.seed=1,2"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "runs/tiny-sweep/seed=1/metrics.jsonl"
    while not metrics.exists() or '"step": 5,' not in metrics.read_text():
        assert process.poll() is None
    process.terminate()
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, said
    assert "stopped by SIGTERM at step" in said
    code, _, said = command(recipe, "train.seed=1,2", "train.steps=300")
    assert code == 0, said
    assert "resumed" in (tmp_path / "runs/tiny-sweep/seed=1/logs/rank-0.log").read_text()
