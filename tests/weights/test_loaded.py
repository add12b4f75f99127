"""Models that were loaded, changed perhaps, and written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import trainfw
from tests.helpers import tiny_recipe
from trainfw import UserError

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    return trainfw.train(tiny_recipe(place, "train.steps=2"), run_dir=place / "run", devices=jax.devices()[:1]).run_dir


def logits(model):
    return np.asarray(model(jnp.asarray(TOKENS)))


def test_others_read_what_is_written(run, tmp_path):
    model, tokenizer = trainfw.load_model(run)
    assert "float32" in model.save(tmp_path / "model")
    again, same = trainfw.load_model(tmp_path / "model")
    np.testing.assert_array_equal(logits(again), logits(model))
    assert same.encode("def f(x): é") == tokenizer.encode("def f(x): é")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(TOKENS)).logits.numpy(), logits(model), atol=1e-4)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert text.decode(tokenizer.encode("def f(x)")) == "def f(x)"
    with pytest.raises(UserError, match="model"):
        again.save(tmp_path / "model")
    with pytest.raises(UserError, match=r"^directory = 3: expected where to write the model, a str or pathlib.Path"):
        model.save(3)


def test_the_weights_are_those_in_memory(run, tmp_path):
    model, _ = trainfw.load_model(run)
    before = logits(model)
    model.final_norm.scale[...] *= 2
    model.save(tmp_path / "changed", dtype="float64")
    again, _ = trainfw.load_model(tmp_path / "changed")
    np.testing.assert_array_equal(logits(again), logits(model))
    assert not np.allclose(logits(again), before)


@pytest.mark.long
def test_an_adapter_is_merged(run, tmp_path):
    trainfw.load_model(run)[0].save(tmp_path / "base")
    adapted = tiny_recipe(tmp_path, "train.steps=2", f"model.from={tmp_path / 'base'}", "adapter={rank: 2, alpha: 4}")
    made = trainfw.train(adapted, run_dir=tmp_path / "run", devices=jax.devices()[:1])
    model, _ = trainfw.load_model(made.run_dir)
    model.layers.attention.query.adapter.lora_b[...] += 0.1
    model.save(tmp_path / "merged")
    again, _ = trainfw.load_model(tmp_path / "merged")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)
    several, _ = trainfw.load_model(tmp_path / "base", adapters={"mine": made.run_dir})
    with pytest.raises(UserError, match="with the adapters mine beside it"):
        several.save(tmp_path / "several")


def test_a_model_that_was_not_loaded_has_no_tokenizer(tmp_path):
    recipe = tiny_recipe(tmp_path)
    program = trainfw.build_program(recipe, jax.devices()[:1])
    with pytest.raises(UserError, match=r"expected a model that trainfw\.load_model returned"):
        program.model(program.init().params).save(tmp_path / "model")
