"""Shapes of convolutional autoencoders, and presets of those that diffusion models are published with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from trainfw.config import Dim, invalid
from trainfw.models.family import ImageFamilyConfig, preset_fields


class AutoencoderConfig(ImageFamilyConfig):
    """A convolutional variational autoencoder of images, as latent diffusion has them (diffusers' AutoencoderKL).

    `preset` gives the values of a published model; other fields override them.
    """

    preset: str | None = None
    """Start from a named model, for example `sd-vae`."""
    image_size: Dim
    """Height and width of the images that are learnt. Others are encoded too, of sizes that the blocks divide."""
    channels: Dim = 3
    """C of images: 3 of colours, 1 of greys."""
    latent_channels: Dim = 4
    """C of latents."""
    # Not strict, so that YAML's list is taken as a tuple: a config is hashed as part of what is compiled.
    block_channels: Annotated[tuple[Dim, ...], Field(strict=False, min_length=1, max_length=12)]
    """C of the blocks of the encoder, from the first; the decoder has them in reverse. Between two blocks height and
    width are halved."""
    layers_per_block: Annotated[int, Field(ge=1, le=1000)] = 2
    """Residual layers in a block of the encoder; one of the decoder has one more."""
    norm_groups: Dim = 32
    """Groups of channels that are normalised together."""
    mid_attention: bool = True
    """Attention between all places, in the middle of encoder and decoder."""
    quant_conv: bool = True
    """A linear map of the encoder's result, place by place (Stable Diffusion 1, 2 and XL have one, 3 has none)."""
    post_quant_conv: bool = True
    """A linear map of latents, place by place, before the decoder."""
    scaling_factor: PositiveFloat = 0.18215
    """Factor by which a diffusion model takes latents, so that their variance is about 1."""
    shift_factor: float = 0.0
    """Number that is taken from latents before they are scaled."""
    num_layers: Literal[1] = Field(default=1, exclude=True)
    """A model that is no stack of like layers counts as one layer: it has no stages."""
    hidden_size: Dim = Field(default=1, exclude=True)
    """C of the innermost block, the last of `block_channels`."""

    @model_validator(mode="before")
    @classmethod
    def _merge_preset(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if "hidden_size" in data or "num_layers" in data:
            field = "hidden_size" if "hidden_size" in data else "num_layers"
            invalid(field, f"{field} follows from block_channels: remove it")
        preset = data.get("preset")
        if isinstance(preset, str):
            data = preset_fields(__package__, preset, preset) | data
        blocks = data.get("block_channels")
        return data | ({"hidden_size": blocks[-1]} if isinstance(blocks, (list, tuple)) and blocks else {})

    @model_validator(mode="after")
    def _shapes_agree(self) -> AutoencoderConfig:
        for channels in self.block_channels:
            if channels % self.norm_groups:
                invalid(
                    "block_channels", f"block_channels = {channels} does not divide by norm_groups = {self.norm_groups}"
                )
        if self.image_size % self.reduction:
            halved = f"{len(self.block_channels) - 1} times between {len(self.block_channels)} blocks"
            invalid("image_size", f"image_size = {self.image_size} cannot be halved {halved} (block_channels)")
        return self

    @property
    def reduction(self) -> int:
        """The factor by which images are higher and wider than their latents."""
        return int(2 ** (len(self.block_channels) - 1))

    @property
    def latent_size(self) -> int:
        """Height and width of latents."""
        return self.image_size // self.reduction

    @property
    def num_patches(self) -> int:
        """Places in the latents of an image: what counts as its tokens."""
        return self.latent_size**2

    def products(self) -> Iterator[int]:
        """List the products of two numbers in each convolution and linear map of encoder and decoder, for one image."""
        blocks, innermost, small = self.block_channels, self.block_channels[-1], self.latent_size
        side, width = self.image_size, blocks[0]
        yield _product(side, 3, self.channels, width)
        for number, channels in enumerate(blocks):
            yield from _residual(side, self.layers_per_block, width, channels)
            width = channels
            if number < len(blocks) - 1:
                side //= 2
                yield _product(side, 3, width, width)
        for _ in range(2):  # the middles of encoder and decoder
            yield from _residual(small, 2, innermost, innermost)
            if self.mid_attention:
                yield from [_product(small, 1, innermost, innermost)] * 4
                yield from [_product(small, 1, innermost, small**2)] * 2  # the scores, and the weighted sum
        yield _product(small, 3, innermost, 2 * self.latent_channels)
        if self.quant_conv:
            yield _product(small, 1, 2 * self.latent_channels, 2 * self.latent_channels)
        if self.post_quant_conv:
            yield _product(small, 1, self.latent_channels, self.latent_channels)
        yield _product(small, 3, self.latent_channels, innermost)
        for number, channels in enumerate(reversed(blocks)):
            yield from _residual(side, self.layers_per_block + 1, width, channels)
            width = channels
            if number < len(blocks) - 1:
                side *= 2
                yield _product(side, 3, width, width)
        yield _product(side, 3, width, self.channels)


def _product(side: int, window: int, inputs: int, outputs: int) -> int:
    """Count those of a convolution to that height and width; a linear map of every place has window 1."""
    return side**2 * window**2 * inputs * outputs


def _residual(side: int, layers: int, inputs: int, outputs: int) -> Iterator[int]:
    for width in (inputs, *[outputs] * (layers - 1)):
        yield _product(side, 3, width, outputs)
        yield _product(side, 3, outputs, outputs)
        if width != outputs:
            yield _product(side, 1, width, outputs)
