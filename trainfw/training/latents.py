"""A frozen autoencoder: models of images learn its latents, and draw them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.errors import UserError
from trainfw.interop import open_autoencoder
from trainfw.models import Autoencoder, AutoencoderConfig
from trainfw.weights import Base, is_run, model_of, open_base

_AT_ONCE = 8


class LatentCodec:
    """Latents of an autoencoder, as a diffusion model takes them: means, shifted and scaled. It is read when needed."""

    def __init__(self, path: str, size: int, channels: int):
        """`size` and `channels` are of the latents that the model takes. Raises UserError where it makes others."""
        base: Base = open_base(path) if is_run(path) else open_autoencoder(path)
        config = base.config
        if not isinstance(config, AutoencoderConfig):
            raise UserError(f"{path}: is a model of family {config.family!r}; expected an autoencoder")
        if config.latent_channels != channels:
            raise UserError(
                f"{path}: makes latents of {config.latent_channels} channels; set "
                f"model.channels={config.latent_channels}, not {channels}"
            )
        self._base, self._config = base, config
        self.shape = (size, size, channels)
        self.image_size, self.image_channels = size * config.reduction, config.channels
        self.identity = f"{base.fingerprint()} {config.scaling_factor} {config.shift_factor}"
        """Changes when the latents do."""

    @cached_property
    def _model(self) -> Autoencoder:
        config = self._config.model_copy(update={"image_size": self.image_size})
        model: Autoencoder = model_of(self._base, config)
        return model

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return latents f32[N, h, w, c] of images f32[N, H, W, C] in [-1, 1]."""
        return self._by_parts(_encoded, images)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self._by_parts(_decoded, latents)

    def _by_parts(self, function: Callable[[Autoencoder, jax.Array], jax.Array], arrays: np.ndarray) -> np.ndarray:
        run, made = partial(function, self._model), []
        for start in range(0, math.ceil(len(arrays) / _AT_ONCE) * _AT_ONCE, _AT_ONCE):
            part = arrays[start : start + _AT_ONCE]
            padded = np.pad(part, [(0, _AT_ONCE - len(part)), *[(0, 0)] * 3])  # of one size, compiled once
            made.append(np.asarray(run(jnp.asarray(padded)))[: len(part)])
        return np.concatenate(made)


@nnx.jit
def _encoded(model: Autoencoder, images: jax.Array) -> jax.Array:
    return model.scaled(model.encode(images)[0])


@nnx.jit
def _decoded(model: Autoencoder, latents: jax.Array) -> jax.Array:
    return model.decode(model.unscaled(latents))
