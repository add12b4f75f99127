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
from tests.helpers import Heard, losses, quicker, tiny_recipe, write_recipe
from trainfw import UserError, build_program, load_recipe, train
from trainfw.checkpoint import Checkpoints, read_identity
from trainfw.data.cache import is_held_out
from trainfw.training import Reporter, RunDirectory
from trainfw.training.base import check_base


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
    identity = read_identity(tmp_path / "run")
    with contextlib.closing(Checkpoints(other, recipe.checkpoint, identity=identity, layer_order=(1, 0))) as target:
        target.save(4, *held)
    shutil.rmtree(directory)
    other.rename(directory)
    train_quietly(recipe, tmp_path / "run", resume="must")
    assert losses(tmp_path / "run") == expected


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose last checkpoint is of step 4."""
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(tiny_recipe(directory), directory / "run", 6, patch)
    return directory


def gone_on(stopped, tmp_path, *overrides, **kwargs):
    """Its losses once it has gone on with these, what it said, and its rows."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    heard = Heard()
    recipe = load_recipe(stopped / "recipe.yaml", overrides)
    train(recipe, devices=jax.devices()[:1], run_dir=tmp_path / "run", reporter=heard, **kwargs)
    sessions = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    changed = [row["changed"] for row in sessions if "changed" in row]
    return losses(tmp_path / "run"), "\n".join(heard.notes), changed[-1] if changed else {}


def test_the_same_numbers_go_on_from_another_place_and_computed_otherwise(straight, stopped, tmp_path):
    _, expected = straight
    shutil.copytree(stopped / "text", tmp_path / "moved")
    source = f"data.source={tmp_path / 'moved'}/*.txt"
    resumed, notes, changed = gone_on(stopped, tmp_path / "a", source, "checkpoint.every=3")
    assert resumed == expected  # bit for bit
    assert "; data.source was [" in notes
    assert changed["checkpoint.every"] == [4, 3]
    otherwise = ["train.accumulation_steps=4", "train.loss_chunk=9", "train.remat=full", "train.scan_layers=false"]
    resumed, _, changed = gone_on(stopped, tmp_path / "b", *otherwise)
    assert {f"{key}={value}".lower() for key, (_, value) in changed.items()} == set(otherwise)
    np.testing.assert_allclose(list(resumed.values()), list(expected.values()), rtol=1e-5)
    assert resumed != expected, "what was to be computed otherwise was"


def test_other_losses_are_accepted_by_key_and_written_down(straight, stopped, tmp_path):
    _, expected = straight
    change = ["optimizer.learning_rate=1e-4", "train.global_batch_size=16"]
    with pytest.raises(
        UserError, match=r"(?s)0\.003 there, 0\.0001 here \(overrides\).*--accept optimizer\.learning_rate"
    ):
        gone_on(stopped, tmp_path / "refused", *change, accept=["train"])
    accept = ["optimizer", "train.global_batch_size", "train.z_loss"]
    resumed, notes, changed = gone_on(stopped, tmp_path / "run", *change, accept=accept)
    assert [resumed[step] for step in (1, 2, 3, 4)] == [expected[step] for step in (1, 2, 3, 4)]
    assert all(resumed[step] != expected[step] for step in (6, 7, 8))
    assert "at step 4; optimizer.learning_rate was 0.003, is 0.0001 (accepted); train.global_batch_size was 8" in notes
    assert "accept: train.z_loss: nothing to accept" in notes
    assert changed == {"optimizer.learning_rate": [0.003, 0.0001], "train.global_batch_size": [8, 16]}
    rows = [json.loads(line) for line in (tmp_path / "run" / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    assert (tokens[4], tokens[8]) == (4 * 8 * 32, 4 * 8 * 32 + 4 * 16 * 32)


def test_a_run_that_is_further_says_how_to_go_on(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped / "run", "runs/tiny")
    (tmp_path / "runs" / "tiny-2").mkdir()
    recipe = load_recipe(stopped / "recipe.yaml", ["train.steps=3"])
    with pytest.raises(UserError, match=r"^overrides: train\.steps = 3: runs/tiny is at step 4 already") as error:
        RunDirectory("runs/tiny").check(recipe, "auto")
    for way in ("train.steps=8", "train.steps=4", "name=tiny-3"):
        assert way in str(error.value)
        further = load_recipe(stopped / "recipe.yaml", ["train.steps=3", way])
        RunDirectory(Path("runs") / further.name).check(further, "auto")
    with pytest.raises(UserError, match=r"--run-dir runs/tiny-3 starts another run"):
        RunDirectory("runs/tiny").check(load_recipe(stopped / "recipe.yaml", ["name=other", "train.steps=3"]), "auto")


def test_what_a_run_started_from_may_move_but_not_change(stopped, tmp_path):
    base = recipe_base(stopped / "run", stopped)
    train_quietly(base, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(stopped / "run", tmp_path / "moved")
    assert check_base(recipe_base(tmp_path / "moved", stopped), run, 1) == check_base(base, run, 1)
    train_quietly(recipe_base(stopped / "run", stopped, "train.steps=2", "train.seed=5"), tmp_path / "other")
    with pytest.raises(UserError, match=r"^overrides: model\.from: .*other: .* started from other weights"):
        check_base(recipe_base(tmp_path / "other", stopped), run, 1)
    with pytest.raises(UserError, match="started from a seed, and goes on with its own weights"):
        check_base(base, RunDirectory(stopped / "run"), 4)


def recipe_base(path, stopped, *overrides):
    return load_recipe(stopped / "recipe.yaml", [f"model.from={path}", "train.steps=1", *overrides])


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
    with pytest.raises(UserError, match=r"--run-dir .*run-2 starts another run"):
        train_quietly(recipe, tmp_path / "run", resume="never")


@pytest.mark.parametrize("held_out", [False, True])
def test_changed_data_is_refused(held_out, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    texts = {path: path.read_text() for path in (tmp_path / "text").iterdir()}
    path, text = next(one for one in texts.items() if is_held_out(one[1], 0.2) == held_out)
    path.write_text(next(other for n in range(99) if is_held_out(other := f"{text}{n}\n", 0.2) == held_out))
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"data.source={tmp_path}/text/*.txt"])
    problem = "the held-out documents are others" if held_out else "the data has changed since"
    with pytest.raises(UserError, match=rf"^overrides \(data\.source\): data: {problem}"):
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


def test_checkpoints_that_are_gone_are_missed(stopped, tmp_path):
    gone_on(stopped, tmp_path)
    recipe, run = load_recipe(stopped / "recipe.yaml"), RunDirectory(tmp_path / "run")
    run.checkpoints.rename(away := tmp_path / "away")
    before = run.metrics_file.read_text()
    with pytest.raises(
        UserError,
        match=r"checkpoints: holds no checkpoint, and .* reached step 8: .* resume='never' \(--resume never\)",
    ):
        train_quietly(recipe, run.path)
    assert run.metrics_file.read_text() == before
    away.rename(run.checkpoints)
    train_quietly(recipe, run.path)
    shutil.rmtree(run.checkpoints)
    heard = Heard()
    train(recipe, devices=jax.devices()[:1], run_dir=run.path, reporter=heard, resume="never")
    assert "had reached step 8; it starts anew, from step 0" in str(heard.notes)


@pytest.mark.long
def test_a_checkpoint_of_a_copy_with_another_recipe_is_said(stopped, tmp_path):
    copies = [tmp_path / name for name in "ab"]
    notes = []
    for copy, overrides in zip(copies, ([], ["optimizer.learning_rate=1e-5"])):
        _, said, _ = gone_on(stopped, copy, *overrides, accept=["optimizer.learning_rate"])
        notes.append(said)
    assert "was saved with" not in "".join(notes), "what was accepted is known"
    a, b = (RunDirectory(copy / "run") for copy in copies)
    shutil.rmtree(a.checkpoints / "8")
    shutil.copytree(b.checkpoints / "8", a.checkpoints / "8")
    heard = Heard()
    train(load_recipe(a.recipe_file), devices=jax.devices()[:1], run_dir=a.path, reporter=heard)
    assert "checkpoint of step 8 was saved with optimizer.learning_rate = 1e-05, and " in str(heard.notes)
    heard = Heard()
    train(load_recipe(b.recipe_file), devices=jax.devices()[:1], run_dir=b.path, reporter=heard)
    assert "was saved with" not in str(heard.notes)


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


@pytest.mark.parametrize("signum", quicker([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
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
