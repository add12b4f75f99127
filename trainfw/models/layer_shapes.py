"""The weights and products of a model of attention and feed-forward layers as data, for estimates by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["table", "scale", "layers.kernel", "layers.experts", "layers.router", "layers.bias", "layers.scale"]


class Weight(NamedTuple):
    """A parameter, as the default rules of sharding split it."""

    kind: Kind
    shape: tuple[int, ...]
    """Layers first where there are any; they are split over pipeline."""
    split: int
    """3: over fsdp (and expert, and context); 2: over tensor too; 1: over tensor alone; 0: not at all."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Tell whether it is a matrix of a layer, which multiplies tokens."""
        return self.kind in ("layers.kernel", "layers.experts")


@dataclass(frozen=True)
class Experts:
    """Spread of tokens over feed-forward layers that are experts."""

    number: int
    per_token: int
    capacity_factor: float
    """Slots of an expert, as a multiple of what it needs where all are chosen equally often."""

    def slots(self, tokens: int) -> int:
        """Rows that one of them takes of so many tokens."""
        return min(max(math.ceil(tokens * self.per_token / self.number * self.capacity_factor), 1), tokens)


@dataclass(frozen=True)
class FeedForward:
    """Gated feed-forward layers: two maps in, one out."""

    width: int
    experts: Experts | None = None
    """Experts of a mixture, each as wide as `width`; None: one layer for all tokens."""


@dataclass(frozen=True)
class ModelShapes:
    """Shapes by which a step is estimated: every layer has attention, and these feed-forward layers side by side."""

    weights: tuple[Weight, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forwards: tuple[FeedForward, ...]
    windows: tuple[int | None, ...] = ()
    """Tokens that each layer's tokens see, of a model that text is drawn from; None: all that came before."""

    @property
    def experts(self) -> Experts | None:
        return next((part.experts for part in self.feed_forwards if part.experts is not None), None)
