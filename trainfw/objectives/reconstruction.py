"""Learning an autoencoder: images are to be made again of their latents, and latents to be near to normal noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.models import Autoencoder
from trainfw.objectives.config import ReconstructionError
from trainfw.objectives.draws import NOISE, normal_rows
from trainfw.objectives.objective import Batch, Draw, Mean, Models, Sums
from trainfw.objectives.schema import Field, ImageShape, Schema, image_rows
from trainfw.parallel import axis_size
from trainfw.scopes import LOSS


@dataclass(frozen=True)
class Reconstruction:
    """The loss of a variational autoencoder (Kingma and Welling, arXiv:1312.6114), summed over images.

    A latent is drawn of its mean and variance, and decoded. The loss of an image is the error of its values, and
    `kl_weight` times the divergence of its latents' distribution from a standard normal one, both summed and divided by
    the number of the image's values: weights mean what they do in latent diffusion (arXiv:2112.10752, appendix G).
    """

    image: ImageShape
    error: ReconstructionError = "l1"
    kl_weight: float = 1e-6
    unit: ClassVar[str] = "image"
    roles: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Literal["images"]] = "images"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        assert self.image.latent_channels is not None
        side = math.isqrt(self.image.num_patches)
        return side, side, self.image.latent_channels

    def schema(self, batch: int, sequence: int) -> Schema:
        """Return that of images, with the `noise` of their latents."""
        rows, dims = image_rows(batch, self.image), ("latent_height", "latent_width", "latent_channel")
        noise = {"noise": Field(("batch", *dims), np.float32)}
        return Schema({**rows.fields, **noise}, {**rows.sizes, **dict(zip(dims, self.latent_shape))})

    def drawn(self, batch: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Return images and weights, without conditions, and noise, drawn for each row by its number."""
        noise = normal_rows(seed, batch["row"], self.latent_shape, NOISE)
        return {"image": batch["image"], "weight": batch["weight"], "noise": noise}

    def loss(self, models: Models, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return the loss, and sums: `loss`, the error alone, and `kl`, the divergence in nats, of an image."""
        model: Autoencoder = models["learner"]
        image, weight_B = batch["image"], batch["weight"]
        mean, logvar = model.encode(image)
        decoded = model.decode(mean + jnp.exp(logvar / 2) * batch["noise"])
        with jax.named_scope(LOSS):
            return self._error(decoded - image, mean, logvar, weight_B)

    def _error(
        self, difference: jax.Array, mean: jax.Array, logvar: jax.Array, weight_B: jax.Array
    ) -> tuple[jax.Array, Sums]:
        error = jnp.abs(difference) if self.error == "l1" else jnp.square(difference)
        error_B = jnp.mean(error, axis=(1, 2, 3))
        kl_B = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
        # Devices along these compute the same images.
        weight_B = weight_B * (1.0 / (axis_size("tensor") * axis_size("context")))
        count = jnp.sum(weight_B)
        sums: Sums = {name: Mean(jnp.sum(x_B * weight_B), count) for name, x_B in (("loss", error_B), ("kl", kl_B))}
        per_value = self.kl_weight / math.prod(self.image.shape)
        return sums["loss"].total + per_value * sums["kl"].total, sums
