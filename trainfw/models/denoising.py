"""A model that takes noise out of images, as objectives and samplers ask it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax

from trainfw.models.common.adapter_inputs import AdapterInputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """Conditions of a batch of images, by the model's kind of conditioning; all None where it has none."""

    label_B: jax.Array | None = None
    """Number of each image's class, i32."""
    caption_BTF: jax.Array | None = None
    """Features of each caption's tokens, f32."""
    caption_mask_BT: jax.Array | None = None
    """1 for the tokens of a caption, 0 for what fills it up, f32."""
    keep_B: jax.Array | None = None
    """0 for rows whose condition is left out, else 1, f32; None: all are kept."""


class ImageConfig(Protocol):
    """The part of a model's config that says which images it takes."""

    @property
    def image_size(self) -> int:
        """Height and width."""
        ...

    @property
    def channels(self) -> int: ...


class DenoisingModel(Protocol):
    """A model of noisy images. All devices along `context` and `tensor` have whole images, each predicts its patches.

    The pixels of a patch are in rows, the channels of a pixel beside each other.
    """

    @property
    def config(self) -> ImageConfig: ...

    def forward(
        self, x_BHWC: jax.Array, time_B: jax.Array, condition: Condition, *, adapters: AdapterInputs | None = None
    ) -> jax.Array:
        """Return the prediction for this device's patches, f32[B, S, O]; O counts patch * patch * out_channels.

        Args:
            x_BHWC: noisy images.
            time_B: their time, f32, from 0 (no noise) to 1000.
            adapters: what adapters read, where the model has any that do.
        """
        ...

    def patches(self, x_BHWC: jax.Array) -> jax.Array:
        """Return this device's patches of images, in the order and layout of a prediction."""
        ...

    def unpatched(self, x_BSO: jax.Array) -> jax.Array:
        """Return whole images of the patches that the devices along `context` and `tensor` have."""
        ...
