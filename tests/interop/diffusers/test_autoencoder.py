"""Autoencoders of diffusers' directories: what is computed, read and written is what diffusers computes and writes."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from flax import nnx
from safetensors.torch import load_file, save_file

from tests.interop.diffusers.autoencoders import SHAPES, first, last, make
from trainfw.errors import UserError
from trainfw.interop import open_autoencoder, save_autoencoder
from trainfw.interop.diffusers.autoencoder import CONFIG, tensor_name
from trainfw.interop.diffusers.autoencoder_config import autoencoder_from_diffusers
from trainfw.interop.diffusers.component import WEIGHTS
from trainfw.models import Autoencoder
from trainfw.weights import model_of

CLOSE = 1e-5


def far(ours: object, theirs: object) -> float:
    """How far two arrays are from each other, relative to the largest number in them."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def paths(model: Autoencoder) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def turned(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_and_every_gradient_are_those_of_diffusers(name, tmp_path):
    theirs, rng = make(name), np.random.default_rng(1)
    theirs.save_pretrained(tmp_path)
    source = open_autoencoder(tmp_path)
    ours = model_of(source, config := source.config)
    image = rng.normal(size=(2, 16, 24, config.channels)).astype(np.float32)
    sides = 16 // config.reduction, 24 // config.reduction
    noise, of_mean, of_logvar = rng.normal(size=(3, 2, *sides, config.latent_channels)).astype(np.float32)
    of_image = rng.normal(size=image.shape).astype(np.float32)

    def loss(model: Autoencoder, image: jax.Array):
        mean, logvar = model.encode(image)
        decoded = model.decode(mean + jnp.exp(logvar / 2) * noise)
        total = jnp.sum(mean * of_mean) + jnp.sum(logvar * of_logvar) + jnp.sum(decoded * of_image)
        return total, (mean, logvar, decoded)

    gradients, computed = jax.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(ours, image)
    found = {tensor_name(path): turned(gradient) for path, gradient in paths(gradients[0]).items()}
    found |= {"image": gradients[1], "mean": computed[0], "logvar": computed[1], "decoded": computed[2]}

    def of_diffusers(dtype: torch.dtype) -> dict[str, np.ndarray]:
        theirs.to(dtype).zero_grad()
        given = first(image).to(dtype).requires_grad_()
        posterior = theirs.encode(given).latent_dist
        decoded = theirs.decode(posterior.mean + posterior.std * first(noise).to(dtype)).sample
        pairs = ((posterior.mean, of_mean), (posterior.logvar, of_logvar), (decoded, of_image))
        sum((x * first(weight).to(dtype)).sum() for x, weight in pairs).backward()
        results = {"image": given.grad, "mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}
        weights = {key: parameter.grad.double().numpy() for key, parameter in theirs.named_parameters()}
        return weights | {key: last(value.double()) for key, value in results.items()}

    exact, narrow = of_diffusers(torch.float64), of_diffusers(torch.float32)
    assert found.keys() == exact.keys()
    for key, expected in exact.items():
        # Gradients of biases that a norm or a softmax takes off are zero but for rounding: theirs too.
        error, theirs_error = (np.abs(np.asarray(x, np.float64) - expected).max() for x in (found[key], narrow[key]))
        assert error < max(CLOSE * np.abs(expected).max(), 3 * theirs_error), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_what_is_written_is_what_was_read_bit_for_bit(name, dtype, tmp_path):
    make(name).to(dtype).save_pretrained(tmp_path / "theirs")
    source = open_autoencoder(tmp_path / "theirs")
    save_autoencoder(tmp_path / "ours", source.config, source.array, dtype=source.dtype)
    one, other = (load_file(tmp_path / each / WEIGHTS) for each in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)
    read = AutoencoderKL.from_pretrained(tmp_path / "ours")
    of_old, of_new = (json.loads((tmp_path / each / CONFIG).read_text()) for each in ("theirs", "ours"))
    assert {key: value for key, value in of_new.items() if of_old[key] != value} == {}
    assert read.config.block_out_channels == list(source.config.block_channels)
    assert open_autoencoder(tmp_path / "ours").fingerprint() == source.fingerprint()


def test_diffusers_decodes_what_we_made(tmp_path):
    written = {key: value for key, value in make("greys").config.items() if key[0] != "_"}
    written = json.loads(json.dumps(written)) | {"_class_name": "AutoencoderKL"}
    config = autoencoder_from_diffusers(written)
    ours = nnx.jit(lambda: Autoencoder(config, rngs=nnx.Rngs(3)))()
    arrays = paths(ours)
    save_autoencoder(tmp_path / "ours", config, arrays.__getitem__)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "ours")
    z = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    assert far(jax.jit(Autoencoder.decode)(ours, z), last(theirs.decode(first(z)).sample)) < CLOSE
    with pytest.raises(UserError, match="is not empty"):
        save_autoencoder(tmp_path / "ours", config, arrays.__getitem__)
    arrays["encoder.out.conv.bias"] = np.full(8, np.nan)
    with pytest.raises(UserError, match=r"tensor encoder.conv_out.bias has values that are not finite"):
        save_autoencoder(tmp_path / "new", config, arrays.__getitem__)
    assert not (tmp_path / "new").exists()


def test_attention_by_its_older_names(tmp_path):
    theirs = make("sd")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    assert torch.equal(
        AutoencoderKL.from_pretrained(tmp_path).state_dict()["quant_conv.weight"], tensors["quant_conv.weight"]
    )
    kernel = open_autoencoder(tmp_path).array("decoder.mid.attention.output.kernel")
    np.testing.assert_array_equal(kernel, theirs.decoder.mid_block.attentions[0].to_out[0].weight.detach().numpy().T)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"_class_name": "AsymmetricAutoencoderKL"},
            r"_class_name = 'AsymmetricAutoencoderKL': expected 'AutoencoderKL'",
        ),
        ({"latents_mean": [0.0, 1.0]}, r"latents_mean = \[0.0, 1.0\] is not supported"),
        ({"norm_type": "spatial"}, r"norm_type = 'spatial' is not supported"),
        ({"act_fn": "gelu"}, r"act_fn = 'gelu' is not supported; expected 'silu'"),
        ({"out_channels": 4}, r"out_channels = 4 is not supported; expected 3"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, r"up_block_types = .* is not supported"),
        ({"layers_per_block": True}, r"layers_per_block = True: expected a whole number"),
        ({"block_out_channels": [8, "16"]}, r"block_out_channels = .*: expected a list of whole numbers"),
        ({"scaling_factor": -1.0}, r"scaling_factor = -1.0: expected a number"),
        ({"norm_num_groups": 3}, r"config.json: block_channels = 8 does not divide by norm_groups = 3"),
        (
            {"latent_channels": 5},
            r"tensor decoder.conv_in.weight has shape \(16, 4, 3, 3\), but the model needs \(16, 5,",
        ),
        ({"layers_per_block": 3}, r"no tensor decoder.up_blocks.0.resnets.2"),
        ({"use_quant_conv": False}, r"the model has no place for tensor quant_conv.bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_does_not_have_is_refused_by_name(changes, said, tmp_path):
    make("sd").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=said):
        open_autoencoder(tmp_path)


def test_directories_that_are_none_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"its autoencoder is in .*vae"):
        open_autoencoder(tmp_path)
    make("sd").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match=r"has no weights: .* only safetensors is read"):
        open_autoencoder(tmp_path)
