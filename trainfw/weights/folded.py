"""Weights of a model that was trained by muP, as those of one without: its factors are folded into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from trainfw.models import FamilyConfig
from trainfw.weights.open import Weights


def without_mup(weights: Weights) -> Weights:
    """Return weights that compute the same without muP; others as they are."""
    return Folded(weights) if weights.config.update_scales is not None else weights


@dataclass(frozen=True)
class Folded:
    """Weights with the factor on logits in the last norm's scale, and that on attention scores in the queries."""

    base: Weights

    @cached_property
    def config(self) -> FamilyConfig:
        return self.base.config.model_copy(
            update={"mup": False, "mup_base_width": 64, "mup_base_head_dim": None},
        )

    @property
    def dtype(self) -> str:
        return self.base.dtype

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        mup: Any = self.base.config
        of_queries = "query_norm.scale" if mup.qk_norm else ("query.kernel", "query.bias")
        if name == "final_norm.scale":
            factor = mup.mup_ratio
        elif name.endswith(of_queries):
            plain: Any = self.config
            factor = mup.attention_scale / plain.attention_scale
        else:
            factor = 1.0
        if factor == 1:
            return self.base.read(name, like, layer_order)
        wide = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
        offset = float(mup.zero_centered_norm and name.endswith(".scale"))
        weight = (self.base.read(name, wide, layer_order) + offset) * factor - offset
        return weight.astype(like.dtype)
