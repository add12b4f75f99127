"""The loss of autoencoders beside what PyTorch computes of diffusers' posterior."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.interop.diffusers.autoencoders import first, make
from trainfw import UserError
from trainfw.interop import open_autoencoder
from trainfw.objectives import Draw, ImageShape, ObjectiveConfig, Reconstruction, make_objective, normal_rows
from trainfw.weights import model_of

SHAPE = ImageShape(size=8, channels=3, num_patches=16, latent_channels=16)
made = functools.partial(make_objective, chunk=1, mask_documents=True, z_loss=0.0, pairs_per_row=1)


def test_the_loss_is_that_of_diffusers_posterior(tmp_path):
    theirs = make("sd3")
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    data = {"image": rng.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32), "weight": np.float32([1, 0, 1, 1])}
    data["row"] = np.array([5, 6, 7, 2**40])
    loss = made(ObjectiveConfig(name="reconstruction", error="l1", kl_weight=0.5), image=SHAPE)
    batch = loss.drawn(data, seed=3)
    assert {name: array.shape for name, array in batch.items()} == {
        name: loss.schema(4, 16).shape(name) for name in loss.schema(4, 16).fields
    }
    np.testing.assert_array_equal(batch["noise"][1:2], normal_rows(3, np.array([6]), (4, 4, 16)))
    source = open_autoencoder(tmp_path)
    model = model_of(source, source.config)

    @jax.jit
    def both(model, batch):
        squared = Reconstruction(SHAPE, error="l2", kl_weight=0.0)
        return [each.loss({"learner": model}, batch, Draw(training=True)) for each in (loss, squared)]

    (total, sums), (of_squares, _) = both(model, batch)
    with torch.no_grad():
        posterior = theirs.encode(first(batch["image"])).latent_dist
        decoded = theirs.decode(posterior.mean + posterior.std * first(batch["noise"])).sample
        difference, weight = decoded - first(batch["image"]), torch.tensor(batch["weight"])
        error, square = difference.abs().mean((1, 2, 3)) @ weight, difference.square().mean((1, 2, 3)) @ weight
        kl = posterior.kl() @ weight
    assert sums["loss"].value() == pytest.approx(error.item() / 3, rel=1e-5)
    assert sums["kl"].value() == pytest.approx(kl.item() / 3, rel=1e-5)
    assert float(total) == pytest.approx((error + 0.5 * kl / 192).item(), rel=1e-5)
    assert float(of_squares) == pytest.approx(square.item(), rel=1e-5)


def test_it_is_for_autoencoders_alone():
    config = ObjectiveConfig(name="reconstruction")
    assert config.reads_images
    with pytest.raises(UserError, match=r"'reconstruction': does not suit a model that is no autoencoder"):
        made(config, image=ImageShape(8, 3, 16))
    with pytest.raises(UserError, match=r"'ddpm': does not suit a model that is an autoencoder"):
        made(ObjectiveConfig(name="ddpm"), image=SHAPE)
    with pytest.raises(UserError, match=r"reads images, and the model reads tokens"):
        made(config)
    with pytest.raises(ValidationError, match=r"kl_weight is for reconstruction, but name is 'ddpm'"):
        ObjectiveConfig(name="ddpm", kl_weight=1.0)
