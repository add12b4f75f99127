"""Shapes of diffusion transformers: DiT, PixArt and SD3 by their fields, and presets of them."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, model_validator

from trainfw.config import Dim, invalid
from trainfw.models.family import DenoisingFamilyConfig, preset_fields


class DiTConfig(DenoisingFamilyConfig):
    """A diffusion transformer. `preset` gives the values of a published model; other fields override them."""

    family: str = "dit"
    preset: str | None = None
    """Start from a named model, for example `dit-xl/2`."""
    out_channels: Dim
    """Channels of a prediction. Left out, they are `channels`; published models of DDPM have twice as many, the second
    half for a variance."""
    patch_size: Dim = 2
    """Height and width of a patch, which is a place of the sequence."""
    intermediate_size: Dim
    """F: width of the feed-forward layer. Left out, it is 4 * hidden_size."""
    num_heads: Dim
    """H: heads of attention."""
    head_dim: Dim
    """h: size of a head. Left out, it is hidden_size / num_heads."""
    pooled_size: Dim | None = None
    """Size of the one vector of each caption that is added to the time, with `joint`. Left out, it is caption_size."""
    positions: Literal["sincos", "rotary", "none"] = "sincos"
    """Positions of patches: 2-D sines and cosines added to the first layer's input (DiT), or turns of queries and
    keys, half of a head by the row and half by the column."""
    position_scale: PositiveFloat = 1.0
    """Divides sin-cos positions (PixArt's interpolation_scale)."""
    largest_grid: Dim | None = None
    """Patches along a side of the largest image, of whose sin-cos positions the middle ones are taken (SD3)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (SD3.5)."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance in the layers' norms."""
    mlp_norm_eps: PositiveFloat
    """The same before the feed-forward layer. Left out, it is norm_eps."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of freshly initialised embeddings of times, classes and captions. Layers' matrices have that
    of Glorot and Bengio, their modulation and the final layer begin at zero."""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        if isinstance(preset, str):
            data = preset_fields(__package__, preset, preset.lower()) | data
        hidden, heads = data.get("hidden_size"), data.get("num_heads")
        filled = {"out_channels": data.get("channels"), "mlp_norm_eps": data.get("norm_eps", 1e-6)}
        if isinstance(hidden, int):
            filled["intermediate_size"] = 4 * hidden
            if isinstance(heads, int) and heads > 0:
                if hidden % heads and "head_dim" not in data:
                    invalid("head_dim", f"hidden_size = {hidden} does not divide by num_heads = {heads}: give head_dim")
                filled["head_dim"] = hidden // heads
        if data.get("conditioning") == "joint":
            filled["pooled_size"] = data.get("caption_size")
        return {key: value for key, value in filled.items() if value is not None} | data

    @model_validator(mode="after")
    def _fields_agree(self) -> DiTConfig:
        if self.image_size % self.patch_size:
            invalid("image_size", f"image_size = {self.image_size} does not divide by patch_size = {self.patch_size}")
        if self.out_channels < self.channels:
            invalid("out_channels", f"out_channels = {self.out_channels} is less than channels = {self.channels}")
        reads = {
            "num_classes": ("class",),
            "caption_size": ("cross", "joint"),
            "caption_length": ("cross", "joint"),
            "pooled_size": ("joint",),
        }
        for name, kinds in reads.items():
            if (getattr(self, name) is not None) != (self.conditioning in kinds):
                verb = "is required by" if self.conditioning in kinds else "does not apply to"
                invalid(name, f"{name} {verb} conditioning: {self.conditioning}")
        if self.text_encoder is not None and self.caption_size is None:
            invalid("text_encoder", f"text_encoder does not apply to conditioning: {self.conditioning}")
        if self.text_encoder_layers is not None and self.text_encoder in (None, "hashed-words"):
            invalid("text_encoder_layers", "is for a text encoder with layers: name one as text_encoder")
        if self.conditioning == "joint" and self.num_layers < 2:
            invalid("num_layers", "num_layers = 1: conditioning: joint needs 2, the last of which is of another shape")
        sincos = self.positions == "sincos"
        if sincos and self.hidden_size % 4:
            invalid("hidden_size", f"hidden_size = {self.hidden_size} is no multiple of 4, as sin-cos positions are")
        if self.positions == "rotary" and self.head_dim % 4:
            invalid("head_dim", f"head_dim = {self.head_dim} is no multiple of 4, as rotary positions in 2-D are")
        if not sincos and (self.position_scale != 1.0 or self.largest_grid is not None):
            name = "position_scale" if self.position_scale != 1.0 else "largest_grid"
            invalid(name, f"{name} does not apply to positions: {self.positions}")
        if self.largest_grid is not None and self.largest_grid < self.grid:
            invalid("largest_grid", f"largest_grid = {self.largest_grid} is less than the image's {self.grid} patches")
        return self

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer that is stacked: with `joint` the last is of another shape, and is not."""
        return ("layer",) * (self.num_layers - (self.conditioning == "joint"))

    @property
    def grid(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2
