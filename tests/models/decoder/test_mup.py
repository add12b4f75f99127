"""muP: nothing changes at the base width, nothing grows with the width, and other formats compute the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainfw
from tests.helpers import random_batches, tiny_recipe, write_recipe
from trainfw import UserError, load_recipe
from trainfw.models import flops_per_token
from trainfw.weights import export_model

TOKENS = np.arange(1, 25).reshape(1, 24) % 200


def recipe_of(directory, width, *overrides, heads=None):
    sizes = [f"model.hidden_size={width}", f"model.num_heads={heads or width // 16}", f"model.head_dim={16}"]
    sizes += [f"model.intermediate_size={3 * width}", "train.validation_batches=1", "optimizer.warmup_steps=0"]
    return tiny_recipe(directory, *sizes, "model.num_kv_heads=2", "optimizer.learning_rate=0.01", *overrides)


def trained(recipe, steps):
    """The state after some steps, and the losses on the way."""
    program = trainfw.build_program(recipe, jax.devices()[:1])
    state, losses = program.init(), []
    first = program.model(jax.tree.map(jnp.copy, state.params))
    for batch in random_batches(recipe, steps):
        state, metrics = program.functions["train"].jitted(state, program.shard_batch(batch))
        losses.append(metrics["loss"].value())
    return first, program.model(state.params), losses


def test_nothing_changes_at_the_base_width(tmp_path):
    plain = trained(recipe_of(tmp_path, 64), 3)[2]
    assert trained(recipe_of(tmp_path, 64, "model.mup=true", "model.mup_base_head_dim=16"), 3)[2] == plain
    assert trained(recipe_of(tmp_path, 64, "model.mup=true", "model.mup_base_width=32"), 3)[2] != plain


def test_what_a_few_steps_change_does_not_grow_with_the_width(tmp_path):
    def change(width, *overrides):
        """The root mean square of what three steps add to the logits."""
        first, last, _ = trained(recipe_of(tmp_path, width, *overrides), 3)
        return float(jnp.sqrt(jnp.mean((last(TOKENS) - first(TOKENS)) ** 2)))

    mup = ["model.mup=true", "model.mup_base_width=32"]
    assert change(32, *mup) == change(32)
    assert change(128, *mup) < 1.4 * change(32)
    assert change(128) > 2 * change(32)


FORMS = {
    "untied": [
        *("model.mup_base_head_dim=4", "model.tie_embeddings=false", "model.qkv_bias=true"),
        *("data.tokenizer={name: bpe, vocab_size: 264}", "model.vocab_size=264"),
    ],
    "query norms": ["model.mup_base_head_dim=4", "model.qk_norm=true"],
}


@pytest.mark.parametrize("form", FORMS)
def test_other_formats_compute_the_same(tmp_path, form, monkeypatch):
    recipe = recipe_of(
        tmp_path, 48, "model.mup=true", "model.mup_base_width=32", "train.steps=2", *FORMS[form], heads=4
    )
    run = trainfw.train(recipe, run_dir=tmp_path / "run", devices=jax.devices()[:1]).run_dir
    model, _ = trainfw.load_model(run)
    assert (model.config.mup, model.config.mup_ratio) == (True, 32 / 48)
    export_model(str(run), str(tmp_path / "hf"))
    again, _ = trainfw.load_model(tmp_path / "hf")
    assert not again.config.mup
    np.testing.assert_allclose(again(TOKENS), model(TOKENS), atol=2e-5)
    model.save(tmp_path / "saved")
    np.testing.assert_allclose(trainfw.load_model(tmp_path / "saved")[0](TOKENS), model(TOKENS), atol=2e-5)
    if form == "untied":
        # The weights are what is looked at, and llama.cpp has a name for few tokenizers.
        monkeypatch.setattr("trainfw.formats.gguf.tokenizer_to_metadata._pre_tokenizer", lambda *_: "gpt-2")
        export_model(str(run), str(tmp_path / "model.gguf"), format="gguf", dtype="float32")
        np.testing.assert_allclose(trainfw.load_model(tmp_path / "model.gguf")[0](TOKENS), model(TOKENS), atol=2e-5)
    with pytest.raises(UserError, match=r"model\.from: .*was trained without muP"):
        trainfw.train(
            load_recipe(recipe, {"model.from": str(tmp_path / "hf"), "model.mup": True}), run_dir=tmp_path / "o"
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.name=muon"], r"optimizer\.name: 'muon': muP's .* adamw alone"),
        (["optimizer.name=optax:sgd"], r"adamw alone"),
        (["adapter.rank=2"], r"adapter: muP has no rule"),
        (["model.moe.num_experts=4", "model.moe.experts_per_token=2"], r"model\.mup: muP's rule for routers"),
        (["model.scale_embeddings=true"], r"model\.mup: muP keeps embeddings"),
        (["model.mup=false", "model.mup_base_width=32"], r"model\.mup_base_width: .* applies with mup: true alone"),
    ],
)
def test_refused(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        load_recipe(write_recipe(tmp_path), ["model.mup=true", *overrides])


def test_a_scripts_own_optimizer_is_refused(tmp_path):
    import optax

    with pytest.raises(UserError, match=r"optimizer\.name = .*adamw alone"):
        trainfw.build_program(tiny_recipe(tmp_path, "model.mup=true"), jax.devices()[:1], optimizer=optax.sgd)


def test_plans_count_the_same_model(tmp_path):
    plain, mup = (recipe_of(tmp_path, 128, *over).model for over in ([], ["model.mup=true"]))
    assert flops_per_token(plain, 32) == flops_per_token(mup, 32)
