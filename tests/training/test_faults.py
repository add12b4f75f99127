"""Steps that go wrong: stopped at, skipped, or left out after going back."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from tests.helpers import Heard, losses, tiny_recipe
from trainfw import RunError, train
from trainfw.data import TrainIterator
from trainfw.training import RunDirectory
from trainfw.training.session import Session


def run_it(recipe, run, **kwargs):
    heard = Heard()
    train(recipe, devices=jax.devices()[:1], run_dir=run, reporter=heard, **kwargs)
    return heard.notes


def changing(monkeypatch, change):
    """First rows of batches, to be filled in; these batches are then changed."""
    rows: set[int] = set()
    take = TrainIterator._take

    def changed(self):
        row, batch = self._next_row, take(self)
        return {**batch, **change(batch)} if row in rows else batch

    monkeypatch.setattr(TrainIterator, "_take", changed)
    return rows


@pytest.fixture
def poisoned(monkeypatch):
    """Batches that start at these rows have no loss."""
    return changing(monkeypatch, lambda batch: {"loss_mask": batch["loss_mask"] * np.float32("nan")})


@pytest.fixture
def confused(monkeypatch):
    """Batches that start at these rows have other targets than theirs."""
    return changing(monkeypatch, lambda batch: {"targets": (batch["targets"] * 7 + 11) % 251})


def test_stop(tmp_path, poisoned):
    poisoned.add(5 * 8)
    with pytest.raises(RunError, match=r"step 6: loss is nan; step 4 is the last one saved; look at the data") as error:
        run_it(tiny_recipe(tmp_path), tmp_path / "run")
    assert RunDirectory(tmp_path / "run").steps() == [4]
    advice = re.search(r"\((optimizer\.learning_rate=\S+) --accept (\S+)\).*\((\S+) or (\S+)\)", str(error.value))
    assert advice, "what is advised can be pasted"
    run_it(tiny_recipe(tmp_path, advice[1], advice[3]), tmp_path / "run", accept=[advice[2]])
    assert [row["policy"] for row in RunDirectory(tmp_path / "run").faults()][-1] == "skip"
    assert advice[4] == "faults.non_finite=rollback"


def test_skip(tmp_path, poisoned):
    poisoned.add(5 * 8)
    notes = run_it(tiny_recipe(tmp_path, "faults.non_finite=skip"), tmp_path / "run")
    assert "warning: step 6: loss is nan; skipped" in notes
    found = losses(tmp_path / "run")
    assert [step for step, loss in found.items() if loss is None] == [6]
    (fault,) = RunDirectory(tmp_path / "run").faults()
    assert (fault["step"], fault["row"], fault["rows"], fault["policy"]) == (6, 40, 8, "skip")
    last = [row for row in RunDirectory(tmp_path / "run").metrics() if "loss" in row][-1]
    assert (last["skipped_steps"], last["rollbacks"]) == (1, 0)


def test_rollback_leaves_the_batch_out_and_is_remembered(tmp_path, poisoned):
    recipe = tiny_recipe(tmp_path, "faults.non_finite=rollback")
    poisoned.add(5 * 8)
    notes = run_it(recipe, tmp_path / "run")
    assert "warning: step 6: loss is nan; going back to step 4" in notes
    assert list(losses(tmp_path / "run")) == list(range(1, 9))
    # The same as a run that has known it from the beginning, in which nothing is poisoned.
    poisoned.clear()
    known = tmp_path / "known"
    known.mkdir()
    (known / "checkpoints").mkdir()
    (known / "faults.jsonl").write_bytes((tmp_path / "run" / "faults.jsonl").read_bytes())
    run_it(recipe, known)
    assert losses(known) == losses(tmp_path / "run")


def test_rollback_before_anything_was_saved(tmp_path, poisoned):
    poisoned.add(8)
    notes = run_it(tiny_recipe(tmp_path, "faults.non_finite=rollback"), tmp_path / "run")
    assert "warning: step 2: loss is nan; going back to the start" in notes
    assert list(losses(tmp_path / "run")) == list(range(1, 9))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many(tmp_path, poisoned, policy):
    poisoned.update(range(16, 800, 8))
    recipe = tiny_recipe(tmp_path, f"faults.non_finite={policy}", "faults.most=2")
    with pytest.raises(RunError, match=r"step [356]: loss is nan; more than faults\.most = 2; "):
        run_it(recipe, tmp_path / "run")


SPIKES = ("faults.spike_sigma=2", "train.steps=50", "optimizer.learning_rate=1e-3", "checkpoint.every=35")


def test_a_spike(tmp_path, confused):
    confused.add(44 * 8)
    notes = run_it(tiny_recipe(tmp_path, *SPIKES), tmp_path / "run")
    assert [note for note in notes if note.startswith("warning: step 45: a spike: loss ")]
    assert [row["step"] for row in RunDirectory(tmp_path / "run").faults()] == [45]


@pytest.mark.long
def test_what_spikes_are_measured_by_is_saved(tmp_path, confused, monkeypatch):
    confused.add(44 * 8)  # ten steps after the checkpoint: too few for a new guard
    recipe = tiny_recipe(tmp_path, *SPIKES)
    run_it(recipe, tmp_path / "straight")
    log = Session._log_step

    def crash(self, step, *rest):
        log(self, step, *rest)
        if step == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_log_step", crash)
        with pytest.raises(KeyboardInterrupt):
            run_it(recipe, tmp_path / "run")
    run_it(recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert [row["step"] for row in RunDirectory(tmp_path / "run").faults()] == [45]
