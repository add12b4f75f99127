"""Random small models against diffusers on CPU PyTorch: predictions, and every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.dit.references import by_their_names, diffusers, disturbed, load, reference, torch
from trainfw.models import Condition, DiTConfig
from trainfw.models.dit.model import time_features

LIMIT = 1e-5


def drawn(seed: int, conditioning: str) -> DiTConfig:
    rng = np.random.default_rng(seed)
    heads, head_dim, patch = int(rng.integers(1, 4)), 4 * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    fields = {"class": {"num_classes": 5}, "cross": {"caption_size": 10, "caption_length": 6, "position_scale": 2.0}}
    fields["joint"] = {
        "caption_size": 10,
        "caption_length": 6,
        "pooled_size": 9,
        "largest_grid": int(rng.integers(5, 8)),
        "qk_norm": seed % 2 == 1,
    }
    if conditioning == "class":
        fields["class"]["mlp_norm_eps"] = 1e-5
    channels = int(rng.integers(1, 5))
    return DiTConfig(
        image_size=patch * int(rng.integers(2, 5)),
        patch_size=patch,
        channels=channels,
        out_channels=channels * int(rng.integers(1, 3)),
        hidden_size=heads * head_dim,
        num_heads=heads,
        num_layers=int(rng.integers(2 if conditioning == "joint" else 1, 4)),
        conditioning=conditioning,
        **fields[conditioning],
    )


def batch_of(config: DiTConfig, seed: int, rows: int = 3):
    """(noised images, times, condition, weights of the predictions in a sum that stands for a loss)"""
    rng = np.random.default_rng(seed)
    shape = (rows, config.image_size, config.image_size)
    condition = Condition()
    if config.conditioning == "class":
        condition = Condition(label_B=rng.integers(0, config.num_classes + 1, rows).astype(np.int32))
    elif config.conditioning == "cross":
        lengths = rng.integers(1, config.caption_length + 1, rows)
        condition = Condition(
            caption_BTF=rng.normal(size=(rows, config.caption_length, config.caption_size)).astype(np.float32),
            caption_mask_BT=(np.arange(config.caption_length) < lengths[:, None]).astype(np.float32),
        )
    elif config.conditioning == "joint":
        condition = Condition(
            caption_BTF=rng.normal(size=(rows, config.caption_length, config.caption_size)).astype(np.float32),
            pooled_BP=rng.normal(size=(rows, config.pooled_size)).astype(np.float32),
        )
    x = rng.normal(size=(*shape, config.channels)).astype(np.float32)
    weights = rng.normal(size=(*shape, config.out_channels)).astype(np.float32)
    # Two of PyTorch's 128 frequencies are off by their last bit, of which a time of 1000 makes 6e-5.
    return x, rng.uniform(0, 150, rows).astype(np.float32), condition, weights


def of_theirs(model, config, x_BHWC, time_B, condition):
    """The prediction of diffusers' model, BHWC."""
    x = torch.tensor(x_BHWC.transpose(0, 3, 1, 2))
    if config.conditioning == "class":
        out = model(x, timestep=torch.tensor(time_B), class_labels=torch.tensor(condition.label_B)).sample
    elif config.conditioning == "joint":
        out = model(
            x,
            timestep=torch.tensor(time_B),
            encoder_hidden_states=torch.tensor(condition.caption_BTF),
            pooled_projections=torch.tensor(condition.pooled_BP),
        ).sample
    else:
        out = model(
            x,
            timestep=torch.tensor(time_B),
            encoder_hidden_states=torch.tensor(condition.caption_BTF),
            encoder_attention_mask=torch.tensor(condition.caption_mask_BT),
        ).sample
    return out.permute(0, 2, 3, 1)


def relative(a, b, size: float = 0.0) -> float:
    return float(np.abs(a - b).max() / max(np.abs(b).max(), size))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("conditioning", ["class", "cross", "joint"])
def test_predictions_and_gradients_are_theirs(conditioning, seed):
    config = drawn(seed, conditioning)
    model, other = disturbed(config, seed), reference(config)
    graphdef, state = nnx.split(model)
    load(other, state, config)
    x, time, condition, weights = batch_of(config, seed)

    @jax.jit
    @jax.grad
    def gradients(state):
        model = nnx.merge(graphdef, state)
        return jnp.sum(model.unpatched(model.forward(x, time, condition)) * weights)

    predict = jax.jit(lambda state: (model := nnx.merge(graphdef, state)).unpatched(model.forward(x, time, condition)))
    ours, expected = predict(state), of_theirs(other, config, x, time, condition)
    assert relative(ours, expected.detach().numpy()) < LIMIT
    (expected * torch.tensor(weights)).sum().backward()
    found = by_their_names(gradients(state), config, copies=False)
    for name, parameter in other.named_parameters():
        # A softmax does not change with a bias of the keys, whose gradient is rounding.
        beside = np.abs(found[name.replace("k.bias", "v.bias").replace("add_k_", "add_v_")]).max()
        if not parameter.grad.any():  # queries of the last layer's caption, which nothing reads
            assert not found[name].any()
            continue
        assert relative(found[name], parameter.grad.numpy(), beside) < LIMIT, name


def test_features_of_a_time_are_theirs():
    time = np.array([0.0, 0.5, 999.0, 1000.0], np.float32)
    for last in (0, 1):
        timesteps = diffusers.models.embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=last)
        np.testing.assert_allclose(time_features(time, last), timesteps(torch.tensor(time)), atol=1e-4)
