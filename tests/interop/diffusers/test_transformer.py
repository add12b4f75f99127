"""Diffusion transformers in diffusers' directories, both ways, and directories that are not to be read."""

from __future__ import annotations

import copy
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.models.dit.references import CLASSES, diffusers, disturbed, flat, reference, torch
from tests.models.dit.test_diffusers import batch_of, drawn, of_theirs, relative
from trainfw.errors import UserError
from trainfw.interop import open_transformer, save_transformer, transformer_from_diffusers, transformer_to_diffusers
from trainfw.models import DiT, DiTConfig
from trainfw.weights import model_of

KINDS = tuple(CLASSES)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def config_of(kind: str) -> DiTConfig:
    config = drawn(3, kind)  # with the lengths of captions that a directory is taken to have
    lengths = {"cross": 120, "joint": 333}
    return config.model_copy(update={"caption_length": lengths[kind]}) if kind in lengths else config


@nnx.jit
def run(model: DiT, x, time, condition):
    return model.unpatched(model.forward(x, time, condition))


def written(model: DiT, directory, dtype="float32") -> None:
    parameters = flat(nnx.state(model))
    save_transformer(directory, model.config, parameters.__getitem__, dtype=dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories that diffusers wrote, and its models, by conditioning."""
    found = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind) / "transformer"
        other = reference(config_of(kind))
        for block in other.transformer_blocks if kind == "class" else ():
            block.norm1.emb = copy.deepcopy(block.norm1.emb)  # which the reference shares; no file may
        other.save_pretrained(directory)
        found[kind] = directory, other
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_their_directories_compute_the_same_here(kind, saved):
    directory, other = saved[kind]
    source = open_transformer(directory)
    assert source.config == config_of(kind)
    batch = batch_of(source.config, 0)[:3]
    expected = of_theirs(other, source.config, *batch).detach().numpy()
    assert relative(run(model_of(source, source.config), *batch), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_our_directories_compute_the_same_there(kind, tmp_path):
    model = disturbed(config_of(kind), 0)
    written(model, tmp_path / "out")
    other = getattr(diffusers, CLASSES[kind]).from_pretrained(tmp_path / "out").eval()
    batch = batch_of(model.config, 0)[:3]
    with torch.no_grad():
        expected = of_theirs(other, model.config, *batch).numpy()
    assert relative(run(model, *batch), expected) < 1e-5
    back = open_transformer(tmp_path / "out")
    assert back.config == model.config
    for path, value in flat(nnx.state(model)).items():
        np.testing.assert_array_equal(back.array(path), value)
    assert len(back.fingerprint()) == 64


def test_layers_are_read_in_the_order_that_is_asked_for_and_where(saved):
    source = open_transformer(saved["class"][0])
    path, layers = "layers.mlp.up.kernel", source.config.num_layers
    order = tuple(reversed(range(layers)))
    like = jax.ShapeDtypeStruct(source.parameters[path].shape, np.dtype("bfloat16"))
    np.testing.assert_array_equal(source.read(path, like, order), source.array(path, "bfloat16")[::-1])
    with pytest.raises(UserError, match=r"no parameter layers.mlp.upp.kernel; did you mean 'layers.mlp.up.kernel'"):
        source.array("layers.mlp.upp.kernel")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_directories_are_read_again(dtype, tmp_path):
    model = disturbed(config_of("joint"), 0)
    written(model, tmp_path / "out", dtype)
    source = open_transformer(tmp_path / "out")
    assert source.dtype == dtype
    np.testing.assert_allclose(source.array("patch.kernel"), model.patch.kernel[...], rtol=1e-2)


def test_published_configs_are_read():
    # As they are on huggingface.co, in the class of diffusers when they were made.
    older = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 72,
        "cross_attention_dim": None,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 32,
        "upcast_attention": False,
        "use_linear_projection": False,
    }
    preset = DiTConfig(preset="dit-xl/2", mlp_norm_eps=1e-5)
    assert transformer_from_diffusers(older) == preset.model_copy(update={"preset": None})
    pixart = older | {"norm_type": "ada_norm_single", "caption_channels": 4096, "cross_attention_dim": 1152}
    preset = DiTConfig(preset="pixart-xl/2")
    assert transformer_from_diffusers(pixart | {"norm_eps": 1e-6}) == preset.model_copy(update={"preset": None})
    for name in ("dit-xl/2", "pixart-xl/2", "sd3-medium"):
        preset = DiTConfig(preset=name).model_copy(update={"preset": None})
        assert transformer_from_diffusers(transformer_to_diffusers(preset)) == preset


def test_what_computes_otherwise_is_refused(saved, tmp_path):
    plain = {kind: json.loads((saved[kind][0] / "config.json").read_text()) for kind in KINDS}
    for kind, changes, said in (
        ("class", {"attention_bias": False}, "attention_bias = False is not supported; expected True"),
        ("class", {"activation_fn": "geglu"}, "activation_fn = 'geglu' is not supported"),
        ("class", {"norm_elementwise_affine": True}, "norm_elementwise_affine = True is not supported"),
        ("class", {"rope_theta": 1.0}, "rope_theta = 1.0 is not supported"),
        ("class", {"num_layers": 0}, "num_layers = 0: expected a whole number of 1 or more"),
        ("class", {"num_layers": True}, "num_layers = True: expected a whole number"),
        ("class", {"num_layers": 10**6}, "config.json: num_layers = 1000000: "),
        ("class", {"norm_eps": "1e-5"}, "norm_eps = '1e-5': expected a number"),
        ("class", {"_class_name": "UNet2DConditionModel"}, "_class_name = 'UNet2DConditionModel': expected one of Di"),
        ("class", {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}, "norm_type = 'layer_norm' of a Tr"),
        ("cross", {"use_additional_conditions": True}, "use_additional_conditions = True is not supported"),
        ("cross", {"sample_size": 128, "use_additional_conditions": None}, "use_additional_conditions = None is not"),
        ("cross", {"caption_channels": None}, "caption_channels = None: expected a whole number"),
        ("cross", {"cross_attention_dim": 5}, "cross_attention_dim = 5 is not supported"),
        ("cross", {"attention_type": "gated"}, "attention_type = 'gated' is not supported"),
        ("joint", {"dual_attention_layers": [0]}, r"dual_attention_layers = \[0\] is not supported"),
        ("joint", {"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not supported"),
        ("joint", {"caption_projection_dim": 7}, "caption_projection_dim = 7 is not supported"),
    ):
        with pytest.raises(UserError, match=f"config.json: {said}" if not said.startswith("config") else said):
            transformer_from_diffusers(plain[kind] | changes)


def test_directories_that_are_damaged_are_refused(saved, tmp_path):
    def changed(kind, change):
        directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved[kind][0], directory)
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)
        return directory

    embedder = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"

    def other_copy(tensors):
        tensors[embedder] = tensors[embedder] + 1

    def other_positions(tensors):
        tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"][:, ::-1].copy()

    for kind, change, said in (
        ("class", other_copy, f"tensor {embedder} differs from transformer_blocks.0"),
        ("class", lambda tensors: tensors.pop("proj_out_1.bias"), "no tensor proj_out_1.bias"),
        ("cross", lambda tensors: tensors.update(more=np.ones(2)), "no place for tensor more"),
        (
            "cross",
            lambda tensors: tensors.update({"proj_out.bias": np.ones(1)}),
            r"proj_out.bias has shape \(1,\), but",
        ),
        ("joint", other_positions, "pos_embed.pos_embed holds other positions"),
    ):
        with pytest.raises(UserError, match=said):
            open_transformer(changed(kind, change))
    with pytest.raises(UserError, match="is no model of diffusers"):
        open_transformer(tmp_path)
    (tmp_path / "pickled").mkdir()
    shutil.copy(saved["class"][0] / "config.json", tmp_path / "pickled")
    with pytest.raises(UserError, match="only safetensors is read"):
        open_transformer(tmp_path / "pickled")


def test_models_that_diffusers_has_not_are_refused(tmp_path):
    for kind, changes, said in (
        ("class", {"positions": "rotary"}, "model.positions = rotary: diffusers' DiTTransformer2DModel has sincos"),
        ("class", {"qk_norm": True}, "model.qk_norm = True"),
        ("class", {"intermediate_size": 7}, "model.intermediate_size = 7"),
        ("cross", {"mlp_norm_eps": 0.5}, "model.mlp_norm_eps = 0.5"),
        ("joint", {"norm_eps": 0.5}, "model.norm_eps = 0.5"),
    ):
        with pytest.raises(UserError, match=said):
            transformer_to_diffusers(config_of(kind).model_copy(update=changes))
    plain = DiTConfig(preset="tiny")
    with pytest.raises(UserError, match=r"model.conditioning = none: diffusers has no transformer of that"):
        transformer_to_diffusers(plain)
    model = disturbed(config_of("class"), 0)
    model.patch.bias.set_value(model.patch.bias[...] * np.nan)
    with pytest.raises(UserError, match=r"pos_embed.proj.bias has values that are not finite: nothing is written"):
        written(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
