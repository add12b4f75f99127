from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from trainfw.models.dit.config import DiTConfig
from trainfw.models.family import Family, Limit, ModelOptions

if TYPE_CHECKING:
    from flax import nnx

    from trainfw.models.dit.model import DiT

TIME_FEATURES = 256
"""Sines and cosines of a time, as in every published model."""


class DiffusionTransformer(Family):
    """Diffusion transformers: DiT, PixArt and SD3, by configuration."""

    config = DiTConfig
    reads: ClassVar[Literal["tokens", "images"]] = "images"

    def build(self, config: DiTConfig, options: ModelOptions, rngs: nnx.Rngs) -> DiT:
        from trainfw.models.dit.model import DiT

        return DiT(config, options, rngs=rngs)

    def limits(self, config: DiTConfig) -> Iterator[Limit]:
        yield Limit("num_heads", config.num_heads, "heads")
        yield Limit("intermediate_size", config.intermediate_size, "mlp")
        yield Limit("hidden_size", config.hidden_size, "mlp")
        yield Limit("hidden_size", config.hidden_size, "embed")
        yield Limit("image_size", config.num_patches, "patches")

    def dims(self, config: DiTConfig) -> Mapping[str, tuple[str, ...]]:
        whole: dict[str, tuple[str, ...]] = dict.fromkeys(("patch", "hidden", "classes", "features"), ())
        return whole | {"patches": ("context", "tensor")}

    def unspread(self, config: DiTConfig) -> Mapping[str, str]:
        unspread = {"expert": "spreads experts, and the model has none; use fsdp"}
        if config.conditioning == "joint":
            unspread["pipeline"] = "the last layer of conditioning: joint is of another shape than those in stages"
        return unspread

    def flops_per_token(self, config: DiTConfig, sequence_length: int) -> float:
        """Model FLOPs of training (forward and backward) on one patch of images of `sequence_length` patches.

            6 * N + 12 * H * h * (sum over layers of the patches, and of the caption's tokens, that a patch attends to)

        With `joint` the caption's tokens attend too, whose share is added.

        N counts the parameters that multiply every patch: the layers' matrices, the patches' own and the final one;
        and, divided by the patches of an image, those that multiply an image once (of the time, and each layer's
        modulation) or the T tokens of its caption. Patches attend to all patches. What remat computes again is never
        counted. As for decoders, forward is 2 FLOPs a parameter, backward twice that; lookups, norms and biases do no
        matrix product.
        """
        D, F, width = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        pixels = config.patch_size**2
        attention, feed_forward = 4 * D * width, 2 * D * F
        of_patch = D * pixels * (config.channels + config.out_channels)
        of_image, of_token = D * (TIME_FEATURES + D), 0
        attended: float = config.num_layers * sequence_length
        of_patch += config.num_layers * (attention + feed_forward)
        layers, features, length = config.num_layers, config.caption_size or 0, config.caption_length or 0
        if config.conditioning == "cross":
            of_image += 6 * D * D
            of_token += D * (features + D) + layers * 2 * D * width
            of_patch += layers * 2 * D * width
            attended += layers * length
        else:
            of_image += D * (6 * D * layers + 2 * D)
        if config.conditioning == "joint":  # the last layer's caption has keys and values, and no more
            of_image += D * (6 * D * (layers - 1) + 2 * D) + D * ((config.pooled_size or 0) + D)
            of_token += D * features + (layers - 1) * (attention + feed_forward) + 2 * D * width
            attended = (layers - 1) * (sequence_length + length) ** 2 / sequence_length + sequence_length + length
        matrices = of_patch + (of_image + of_token * length) / sequence_length
        return 6.0 * matrices + 12.0 * width * attended

    def tiny(self, config: DiTConfig, *, layers: int, tensor: int) -> dict[str, object]:
        small: dict[str, object] = {
            "image_size": 8 * config.patch_size,
            "channels": 1,
            "out_channels": 2 if config.out_channels > config.channels else 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_layers": layers,
            "num_heads": 4,
            "head_dim": 16,
        }
        if config.largest_grid is not None:
            small["largest_grid"] = 16
        if config.num_classes is not None:
            small["num_classes"] = 10
        if config.caption_size is not None:
            small |= {"caption_size": 16, "caption_length": 4, "text_encoder": "hashed-words"}
        return small if config.pooled_size is None else small | {"pooled_size": 16}
