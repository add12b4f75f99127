from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from trainfw.models.autoencoder.config import AutoencoderConfig
from trainfw.models.family import Family, Limit, ModelOptions

if TYPE_CHECKING:
    from flax import nnx

    from trainfw.models.autoencoder.model import Autoencoder


class ImageAutoencoder(Family):
    """Convolutional autoencoders of images: Stable Diffusion 1 to 3, SDXL and FLUX, by configuration."""

    config = AutoencoderConfig
    reads: ClassVar[Literal["tokens", "images"]] = "images"

    def build(self, config: AutoencoderConfig, options: ModelOptions, rngs: nnx.Rngs) -> Autoencoder:
        from trainfw.models.autoencoder.model import Autoencoder

        return Autoencoder(config, options, rngs=rngs)

    def limits(self, config: AutoencoderConfig) -> Iterator[Limit]:
        for channels in dict.fromkeys(config.block_channels):
            yield Limit("block_channels", channels, "embed")

    def dims(self, config: AutoencoderConfig) -> Mapping[str, tuple[str, ...]]:
        return {"window": (), "channels": ()}

    def unspread(self, config: AutoencoderConfig) -> Mapping[str, str]:
        whole = "an image is convolved whole, on one device; use data or fsdp, for images of their own"
        return {
            "pipeline": "encoder and decoder are no stack of like layers, which stages could share; use fsdp",
            **dict.fromkeys(("context", "tensor"), whole),
            "expert": "the model has no experts; use fsdp",
        }

    def flops_per_token(self, config: AutoencoderConfig, sequence_length: int) -> float:
        """Model FLOPs of training (forward and backward) on one place of the latents, of `sequence_length` places.

        6 for each product of two numbers in the convolutions, linear maps and attention of encoder and decoder, at
        `image_size`, which has as many places as `num_patches`.
        """
        return 6.0 * sum(config.products()) / config.num_patches

    def tiny(self, config: AutoencoderConfig, *, layers: int, tensor: int) -> dict[str, object]:
        blocks = min(len(config.block_channels), 3)
        channels = list(itertools.islice(itertools.chain([16, 32], itertools.repeat(32)), blocks))
        return {"image_size": 16, "block_channels": channels, "norm_groups": 8, "layers_per_block": 1}
