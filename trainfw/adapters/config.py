from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from trainfw.config import Config, PositiveInt, invalid

_ATTENTION = tuple(f"{at}.{to}" for at in ("layers", "last") for to in ("attention.*", "caption_attention.*"))
_MLP = tuple(f"{at}.{of}" for at in ("layers", "last") for of in ("mlp.*", "caption_mlp.*"))
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "mlp": _MLP,
    "all-linear": _ATTENTION + _MLP,
    "embeddings": ("embedding", "head"),
}
"""Names of groups of weights to put adapters on; a router is in none of them."""


class PatternConfig(Config):
    """Another rank or scale for some of the weights."""

    rank: PositiveInt | None = None
    """r of these weights; by default the adapter's."""
    alpha: PositiveFloat | None = None
    """alpha of these weights; by default the adapter's."""


class AdapterConfig(Config):
    """Train low-rank updates of a frozen base, rather than its weights.

    A linear map y = x W becomes y = x W + s x A B, where A (in, r) and B (r, out) learn and W does not (LoRA, Hu et al.
    2021, arXiv:2106.09685). B starts at zero, so that training starts from the base itself.
    """

    kind: Literal["lora", "rslora", "dora"] = "lora"
    """Kind of update. `lora`: s = alpha / r. `rslora`: s = alpha / sqrt(r), which keeps the update's size as r grows
    (arXiv:2312.03732). `dora`: LoRA of the direction of each column of W, whose length is learnt separately
    (arXiv:2402.09353)."""
    rank: PositiveInt = 16
    """Rank of the update, r."""
    alpha: PositiveFloat = 32.0
    """Scale of the update, see `kind`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped while training. The draw depends on the mesh: a run that goes on
    with another mesh drops other inputs."""
    targets: str | list[str] = "all-linear"
    """Weights to put adapters on: `attention`, `mlp`, `all-linear` (both), `embeddings` (table and head), or patterns
    of names such as `layers.attention.query`; a list takes any of these."""
    patterns: dict[str, PatternConfig] = Field(default_factory=dict)
    """Patterns of names -> another rank or alpha for these weights; if several match, the last one counts."""
    base: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    """Number format of the frozen weights; by default train.compute_dtype. `nf4`: 4 bits with scales of 8 bits (QLoRA,
    arXiv:2305.14314), `int8`: a scale for each output. These two are for matrices: norms and biases stay in
    bfloat16."""
    block: int = Field(default=64, ge=2, le=4096, multiple_of=2)
    """Number of weights that share a scale (nf4). It must divide each device's part of every matrix."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of names (`embedding`, `head`) that stay in bfloat16 (int8, nf4)."""
    from_: str | None = Field(default=None, alias="from")
    """Adapter to go on from: a run, or a directory in PEFT's or (of `dit`) diffusers' form. It must have the rank and
    the targets given here."""

    @model_validator(mode="after")
    def _quantised(self) -> AdapterConfig:
        if self.exclude and self.base not in ("int8", "nf4"):
            invalid("exclude", f"exclude is for base: int8 or nf4, but base is {self.base!r}: remove one of them")
        return self

    def scale(self, rank: int, alpha: float) -> float:
        """Return s for a rank and an alpha."""
        return alpha / (math.sqrt(rank) if self.kind == "rslora" else rank)
