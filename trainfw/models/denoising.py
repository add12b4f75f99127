"""The contract of a model that predicts how a noised image is to be denoised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax

from trainfw.models.common.adapter_inputs import AdapterInputs
from trainfw.models.family import ImageFamilyConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """Conditions of the images of a batch; None where the model takes none of the kind."""

    label_B: jax.Array | None = None
    """Class of each image, i32."""
    caption_BTF: jax.Array | None = None
    """Features of the captions' tokens."""
    caption_mask_BT: jax.Array | None = None
    """1 for tokens of the caption, 0 for padding, f32; all of them by default."""
    pooled_BP: jax.Array | None = None
    """One vector of each caption, where a model reads one; the mean of its tokens by default."""
    keep_B: jax.Array | None = None
    """0 where the row's condition is left out: its class is then the one after the last, its caption all zeros. f32."""


class DenoisingModel(Protocol):
    """A model as objectives and samplers ask it: what to learn of a noised image, patch by patch.

    Images are whole on every device along `context` and `tensor`; each device has its own patches, parts that follow
    one another: over `context` first, and within those over `tensor`. Numbers of a patch are in the order row, column,
    channel.
    """

    @property
    def config(self) -> ImageFamilyConfig: ...

    def forward(
        self, x_BHWC: jax.Array, time_B: jax.Array, condition: Condition, *, adapters: AdapterInputs | None = None
    ) -> jax.Array:
        """Return the prediction for this device's patches, prediction_BSO, f32.

        Args:
            x_BHWC: noised images.
            time_B: f32 from 0 to 1000: the step of DDPM; 1000 times the share of noise of flow matching.
            condition: conditions of the rows.
            adapters: inputs of adapters, where the model has any that read them.
        """

    def patches(self, x_BHWC: jax.Array) -> jax.Array:
        """Return this device's patches of images, x_BSO, in the order of the prediction."""

    def unpatched(self, x_BSO: jax.Array) -> jax.Array:
        """Return whole images from the patches of all devices, x_BHWC."""
