"""A run that learns from pairs: it goes on bit for bit, validates, and plans."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests.helpers import losses, quicker
from trainfw import UserError, load_model, load_recipe, train
from trainfw.training import evaluate
from trainfw.training.run_directory import RunDirectory


def recipe_of(directory, *overrides):
    rng = np.random.default_rng(0)
    with (directory / "pairs.jsonl").open("w") as file:
        for i in range(60):
            number = int(rng.integers(100, 999))
            row = {"prompt": f"{i}: {number} + 1 = ", "chosen": f"{number + 1}.", "rejected": f"{number - 1}!"}
            file.write(json.dumps(row) + "\n")
    tree = {
        "name": "pairs",
        "model": {"preset": "tiny", "vocab_size": 258},
        "objective": {"name": "dpo", "beta": 0.5},
        "data": {
            "source": str(directory / "pairs.jsonl"),
            "format": "preferences",
            "chat_template": False,
            "sequence_length": 64,
            "pairs_per_row": 3,
            "validation_fraction": 0.2,
            "cache_dir": str(directory / "cache"),
        },
        "train": {"steps": 8, "global_batch_size": 4, "log_every": 1},
        "optimizer": {"learning_rate": 3.0e-3, "schedule": "constant"},
        "checkpoint": {"every": 4},
    }
    return load_recipe(tree, overrides)


@pytest.mark.parametrize(
    "more", quicker([(), ("adapter={rank: 4, dropout: 0.1}",)], [()]), ids=["reference", "adapter"]
)
def test_a_run_goes_on_bit_for_bit(tmp_path, more):
    devices = jax.devices()[:1]
    whole = train(recipe_of(tmp_path, *more), devices=devices, run_dir=tmp_path / "whole")
    for steps in (4, 8):
        again = train(recipe_of(tmp_path, *more, f"train.steps={steps}"), devices=devices, run_dir=tmp_path / "again")
    assert losses(whole.run_dir) == losses(again.run_dir)
    assert whole.validation == again.validation

    first, last = (row for row in RunDirectory(whole.run_dir).metrics() if "validation_loss" in row)
    assert first["validation_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert first["validation_preference_accuracy"] == 0.5
    assert last["validation_preference_accuracy"] > 0.9
    assert last["validation_pairs"] == whole.validation.count == first["validation_pairs"]
    assert "validation_perplexity" not in last
    step = next(row for row in RunDirectory(whole.run_dir).metrics() if row["step"] == 8)
    assert {"preference_accuracy", "reward_margin", "kl", "tokens_per_second"} <= step.keys()
    assert step["tokens"] == 8 * 4 * 2 * 64

    validation, _ = evaluate(whole.run_dir)
    assert validation.loss == pytest.approx(whole.validation.loss, rel=1e-6)
    model, _ = load_model(whole.run_dir)
    assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 258)


def test_a_reference_of_other_weights_is_refused(tmp_path):
    def trained(name, *overrides):
        return train(recipe_of(tmp_path, *overrides), devices=jax.devices()[:1], run_dir=tmp_path / name)

    first = trained("first", "train.steps=4", "objective={name: orpo}")
    start = f"model={{from: {first.run_dir}}}"
    trained("second", start, "train.steps=4")
    trained("first", "train.steps=6", "objective={name: orpo}")
    with pytest.raises(UserError, match=r"model.from.*is not the base that what is in .*second was trained on"):
        trained("second", start, "train.steps=8")
