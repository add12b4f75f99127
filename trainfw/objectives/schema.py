from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from trainfw.models import Conditioning


@dataclass(frozen=True)
class Field:
    """An array of a batch: the names of its dims, the first of which is `batch`, and its dtype."""

    dims: tuple[str, ...]
    dtype: DTypeLike


@dataclass(frozen=True)
class Schema:
    """The arrays of a global batch by name, and the sizes of their dims.

    `batch` counts what stays together on one device and in one microbatch: a row, or a group of rows (`group`), such as
    a pair. `batch` and `sequence` are split over the mesh, and all other dims are whole on every device.
    """

    fields: Mapping[str, Field]
    sizes: Mapping[str, int]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array of the global batch."""
        return tuple(self.sizes[dim] for dim in self.fields[name].dims)

    @property
    def tokens(self) -> int:
        """Places for a token in a batch: the rows of all groups, each of `sequence` tokens (patches, of images)."""
        return math.prod(self.sizes.get(dim, 1) for dim in ("batch", "group", "sequence"))


def token_rows(batch: int, sequence: int, *, group: int | None = None) -> Schema:
    """Return the schema of packed rows of tokens, or of groups of such rows.

    `tokens` and `targets` (the token after each), `segment_ids` (1, 2, ... by document within the row; 0 is padding),
    `positions` (within the document) are int32 and `loss_mask` (1 where the target is to be learnt) is float32, each of
    (batch, sequence) or (batch, group, sequence).
    """
    dims = ("batch", "sequence") if group is None else ("batch", "group", "sequence")
    whole = Field(dims, np.int32)
    fields = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), whole)
    sizes = {"batch": batch, "sequence": sequence} | ({} if group is None else {"group": group})
    return Schema(fields | {"loss_mask": Field(dims, np.float32)}, sizes)


@dataclass(frozen=True)
class ImageShape:
    """Sizes of the images that a model takes, pixels or latents, and the kind of their condition."""

    size: int
    """Height and width."""
    channels: int
    num_patches: int
    conditioning: Conditioning = "none"
    """`class`: a label; `cross` and `joint`: features of a caption."""
    caption_length: int | None = None
    """Tokens of a caption."""
    caption_size: int | None = None
    """Features of a token."""
    latent_channels: int | None = None
    """C of the latents that an autoencoder makes of them, of a square of `num_patches` places; None for other
    models."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, self.channels


def image_rows(batch: int, image: ImageShape) -> Schema:
    """Return the schema of images as data gives them, without what an objective draws for them.

    `image` is float32 of (batch, height, width, channel), from -1 to 1 where it is of pixels; `weight` is float32, 0
    for rows that only fill up a batch, else 1. With a condition there is `label`, int32, or `caption`, float32 of
    (batch, caption, feature), and `caption_mask`, float32, 1 for its tokens.
    """
    fields = {"image": Field(("batch", "height", "width", "channel"), np.float32)}
    fields["weight"] = Field(("batch",), np.float32)
    sizes = {"batch": batch, "sequence": image.num_patches}
    sizes |= dict(zip(("height", "width", "channel"), image.shape))
    if image.conditioning == "class":
        fields["label"] = Field(("batch",), np.int32)
    elif image.conditioning != "none":
        assert image.caption_length is not None
        assert image.caption_size is not None
        sizes |= {"caption": image.caption_length, "feature": image.caption_size}
        fields["caption"] = Field(("batch", "caption", "feature"), np.float32)
        fields["caption_mask"] = Field(("batch", "caption"), np.float32)
    return Schema(fields, sizes)
