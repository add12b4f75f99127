"""A run stopped at any moment and resumed is the run that was never stopped."""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data.test_chat import SMOLLM2, make_tokenizer
from tests.helpers import losses, tiny_recipe, write_recipe
from trainfw import UserError, build_program, load_recipe, train
from trainfw.checkpoint import Checkpoints
from trainfw.training import Reporter, RunDirectory


class Quiet(Reporter):
    def note(self, text: str) -> None: ...


def train_quietly(recipe, run, devices=1, **kwargs):
    return train(recipe, devices=jax.devices()[:devices], run_dir=run, reporter=Quiet(), **kwargs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight steps without a stop."""
    directory = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(directory)
    train_quietly(recipe, directory / "run")
    return recipe, losses(directory / "run")


def stop_after(recipe, run, step, monkeypatch, **kwargs):
    """Train until just after `step`, then fail as a crash would."""
    from trainfw.training.session import Session

    log = Session._log_step

    def crash(self, at, *rest):
        log(self, at, *rest)
        if at == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_log_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train_quietly(recipe, run, **kwargs)


def test_resumed_is_bitwise_the_uninterrupted_run(straight, tmp_path, monkeypatch):
    recipe, expected = straight
    stop_after(recipe, tmp_path / "run", 6, monkeypatch)
    assert 5 in losses(tmp_path / "run")  # beyond the checkpoint of step 4: to be replaced
    train_quietly(recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == expected


@pytest.mark.long
def test_resumed_on_another_mesh(straight, tmp_path, monkeypatch):
    recipe, expected = straight
    stop_after(recipe, tmp_path / "run", 6, monkeypatch)
    train_quietly(recipe, tmp_path / "run", devices=8)
    resumed = losses(tmp_path / "run")
    assert resumed.keys() == expected.keys()
    np.testing.assert_allclose(list(resumed.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.long
def test_resumed_from_stages_that_held_other_layers(straight, tmp_path, monkeypatch):
    recipe, expected = straight
    stop_after(recipe, tmp_path / "run", 6, monkeypatch)
    state = build_program(recipe, jax.devices()[:1]).abstract_state
    rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
    directory, other = tmp_path / "run" / "checkpoints", tmp_path / "other"
    with contextlib.closing(Checkpoints(directory, recipe.checkpoint, layer_order=(1, 0), read_only=True)) as source:
        held = source.restore(4, state.params, rest)
    with contextlib.closing(Checkpoints(other, recipe.checkpoint, layer_order=(1, 0))) as target:
        target.save(4, *held)
    shutil.rmtree(directory)
    other.rename(directory)
    train_quietly(recipe, tmp_path / "run", resume="must")
    assert losses(tmp_path / "run") == expected


def test_a_finished_run_is_left_alone(straight, tmp_path):
    recipe, expected = straight
    train_quietly(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "8").stat().st_mtime_ns
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train_quietly(recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == expected
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "run" / "checkpoints" / "8").stat().st_mtime_ns == before


def test_another_recipe_is_refused_by_key(straight, tmp_path):
    recipe, _ = straight
    train_quietly(recipe, tmp_path / "run")
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    with pytest.raises(
        UserError, match=r"train\.seed: 0 there, 1 here: cannot change in a run: it is read at the start alone\nset"
    ):
        train_quietly(other, tmp_path / "run")
    with pytest.raises(UserError, match="--run-dir .*run-2 starts another run"):
        train_quietly(recipe, tmp_path / "run", resume="never")


def test_changed_data_is_refused(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    stop_after(recipe, tmp_path / "run", 6, monkeypatch)
    (tmp_path / "text" / "0.txt").write_text("another document altogether\n" * 20)
    with pytest.raises(UserError, match="data has changed"):
        train_quietly(recipe, tmp_path / "run")
    assert losses(tmp_path / "run")[6]  # nothing saved is lost


@pytest.mark.long
def test_a_template_with_a_clock_is_told_one_day_in_a_run(tmp_path, monkeypatch):
    make_tokenizer(tmp_path / "t", "{{ strftime_now('%d %b %Y') }}" + SMOLLM2)
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}] for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = {"source": str(tmp_path / "d.jsonl"), "format": "chat", "sequence_length": 256, "validation_fraction": 0.3}
    data |= {"tokenizer": {"name": "file", "path": str(tmp_path / "t")}}
    changes = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    recipe = tiny_recipe(tmp_path, "model.vocab_size=300", "train.steps=1", *changes)
    train_quietly(recipe, tmp_path / "run")
    today = datetime.date.today()

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return today + datetime.timedelta(days=1)

    monkeypatch.setattr("trainfw.training.run_directory.datetime.date", Tomorrow)
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})})
    assert train_quietly(longer, tmp_path / "run").step == 2
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.date == today.isoformat()


def test_retention(tmp_path):
    recipe = tiny_recipe(tmp_path, "checkpoint={every: 1, keep_last: 2, keep_every: 3}")
    train_quietly(recipe, tmp_path / "run")
    assert RunDirectory(tmp_path / "run").steps() == [3, 6, 7, 8]


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    # A recipe.yaml of one's own must not be overwritten with the resolved one.
    (tmp_path / "run" / "recipe.yaml").write_text("precious")
    with pytest.raises(UserError, match=r"holds 'recipe\.yaml' but no run"):
        train_quietly(tiny_recipe(tmp_path), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "precious"


def command(recipe: Path, run: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "trainfw", "train", str(recipe), *overrides, "--run-dir", str(run)]


def wait_until(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.long
def test_kill_9_at_a_random_moment(tmp_path):
    recipe = write_recipe(
        tmp_path, train={"steps": 40, "global_batch_size": 8, "log_every": 1}, checkpoint={"every": 5}
    )
    one_device = ["--devices", "1"]
    subprocess.run([*command(recipe, tmp_path / "straight"), *one_device], check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command(recipe, tmp_path / "killed"), *one_device], stdout=subprocess.DEVNULL)
    wait_until(process, lambda: bool(RunDirectory(tmp_path / "killed").steps()))
    time.sleep(random.random() * 0.3)
    process.kill()
    process.wait()
    output = subprocess.run(
        [*command(recipe, tmp_path / "killed"), *one_device], check=True, capture_output=True, text=True
    ).stdout
    assert "resumed" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "killed")) == 40


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resumes(signum, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 2000}, checkpoint={"every": 0})
    process = subprocess.Popen(
        command(recipe, tmp_path / "run"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_until(process, lambda: len(list(RunDirectory(tmp_path / "run").metrics())) > 3)
    process.send_signal(signum)
    error = process.communicate()[1]
    assert process.returncode == 128 + signum
    assert "the same command resumes" in error
    assert "Traceback" not in error
    assert RunDirectory(tmp_path / "run").steps()[-1] >= 3
