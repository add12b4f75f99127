"""One family of decoder-only transformers; `ModelConfig` makes it Llama, Qwen, Mistral or Gemma."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.models.common.adapter_inputs import AdapterInputs
from trainfw.models.common.attention import Attention, Cache, Context
from trainfw.models.common.layers import MLP, Embedding, Linear, RMSNorm
from trainfw.models.common.moe import MoE, MoEStats
from trainfw.models.common.rope import rope_turns
from trainfw.models.decoder.config import LayerKind, ModelConfig
from trainfw.models.decoder.slots import CacheDtype, SlotCache, Slots, abstract_caches, slot_cache
from trainfw.models.family import ModelOptions
from trainfw.models.language_model import LanguageModel
from trainfw.models.layer_stack import (
    Unstacked,
    gather_sequence,
    init_stack,
    is_unstacked,
    part_of,
    scatter_sequence,
)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma normalises what is added too.

    x_BSD is split over `tensor` along its sequence, and so are the norms; attention and mlp take all of it (sequence
    parallelism: Korthikanti et al., arXiv:2205.05198).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F, std = config.hidden_size, config.intermediate_size, config.hidden_std
        self.attention = Attention(config, rngs=rngs)
        dense = config.moe is None
        self.mlp = MLP(D, F, activation=config.activation, std=std, rngs=rngs) if dense else MoE(config, rngs=rngs)
        self.attention_norm, self.mlp_norm = _norm(config), _norm(config)
        self.attention_post_norm = _norm(config) if config.post_norms else None
        self.mlp_post_norm = _norm(config) if config.post_norms else None

    def __call__(
        self, x_BSD: jax.Array, context: Context, cache: Cache, kind: LayerKind
    ) -> tuple[jax.Array, tuple[Cache, MoEStats | None]]:
        """(x_BSD, (the cache extended, what the router did))"""
        y_BSD, cache = self.attention(gather_sequence(self.attention_norm(x_BSD)), context, kind, cache)
        y_BSD = scatter_sequence(y_BSD)
        if self.attention_post_norm is not None:
            y_BSD = self.attention_post_norm(y_BSD)
        x_BSD = x_BSD + y_BSD
        h_BSD, stats = gather_sequence(self.mlp_norm(x_BSD)), None
        if isinstance(self.mlp, MoE):
            # Text must not depend on what else is in the batch: while decoding nothing is dropped.
            y_BSD, stats = self.mlp(h_BSD, context.mask_BS, dropless=cache is not None)
        else:
            y_BSD = self.mlp(h_BSD)
        y_BSD = scatter_sequence(y_BSD)
        if self.mlp_post_norm is not None:
            y_BSD = self.mlp_post_norm(y_BSD)
        return x_BSD + y_BSD, (cache, stats)


def _norm(config: ModelConfig, multiplier: float = 1.0) -> RMSNorm:
    eps, zero_centered = config.norm_eps, config.zero_centered_norm
    return RMSNorm(config.hidden_size, eps=eps, zero_centered=zero_centered, multiplier=multiplier)


class Transformer(LanguageModel):
    """Tokens to logits, of the shape that the config says."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, options: ModelOptions | None = None, *, rngs: nnx.Rngs):
        super().__init__(config, options or ModelOptions())
        D, V, std = config.hidden_size, config.vocab_size, config.init_std
        self.embedding = Embedding(V, D, std=std, rngs=rngs)
        fp8 = self.options.matmul_dtype == "fp8"
        self.layers = init_stack(lambda rngs: DecoderLayer(config, rngs=rngs), config.num_layers, rngs, fp8=fp8)
        self.final_norm = _norm(config, config.mup_ratio)  # on the logits: the head is linear
        self.head = None if config.tie_embeddings else Linear((D, V), ("embed", "vocab"), std=std, rngs=rngs)

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        x_BSD = super().embed(tokens_BS)
        if self.config.scale_embeddings:
            x_BSD = x_BSD * jnp.asarray(math.sqrt(self.config.hidden_size), x_BSD.dtype)
        return x_BSD

    def context(self, positions_BS: jax.Array, segment_ids_BS: jax.Array | None, mask_BS: jax.Array | None) -> Context:
        turns = self.turns(positions_BS)
        return Context(turns, segment_ids_BS=segment_ids_BS, mask_BS=mask_BS, ring=self.options.ring)

    @staticmethod
    def block(layer: Any, x_BSD: jax.Array, context: Context, own: Any, kind: LayerKind) -> tuple[jax.Array, Any]:
        return layer(x_BSD, context, own, kind)

    @property
    def weighs_tokens(self) -> bool:
        return self.config.moe is not None

    @property
    def num_kv_heads(self) -> int | None:
        return self.config.num_kv_heads

    @property
    def final_softcap(self) -> float | None:
        return self.config.final_softcap

    def abstract_caches(self, dtype: CacheDtype, **sizes: int) -> dict[LayerKind, SlotCache]:
        """See `SlotModel`."""
        return abstract_caches(self.config, dtype, **sizes)

    def extend_slots(
        self, tokens_BS: jax.Array, slots: Slots, keep_B: jax.Array, dtype: CacheDtype, adapters: AdapterInputs | None
    ) -> tuple[jax.Array, dict[LayerKind, SlotCache]]:
        """See `SlotModel`."""
        kinds = self.config.layer_kinds
        places = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        context = Context(self.turns(slots.lengths_B[:, None] + jnp.arange(tokens_BS.shape[1])), slots=slots)
        apart = any(isinstance(x, Unstacked) for x in jax.tree.leaves(slots.caches, is_leaf=is_unstacked))
        own: Any = jnp.asarray(places, jnp.int32)
        if apart:
            of_layers = [part_of(slots.caches[kind], place) for kind, place in zip(kinds, places)]
            own = jax.tree.map(lambda *parts: Unstacked(parts), *of_layers)
            context = replace(context, slots=replace(slots, caches={}))
        x_BSD, ((k_LBSKh, v_LBSKh), _) = self.stack.run(
            self.embed(tokens_BS), (), lambda _: context, own=own, adapters=adapters
        )
        # Written once all layers have read: XLA would else copy every cache.
        x_BSD, k_LBSKh, v_LBSKh = jax.lax.optimization_barrier((x_BSD, k_LBSKh, v_LBSKh))

        def written(cache: SlotCache, k: jax.Array, v: jax.Array, kind: LayerKind) -> SlotCache:
            return cache.written(slot_cache(k, v, dtype), slots.ends_B[kind], keep_B, slots.slot)

        caches = {}
        for kind in dict.fromkeys(kinds):
            numbers = [i for i, other in enumerate(kinds) if other == kind]
            if apart:
                new = [
                    written(part_of(slots.caches[kind], place), k_LBSKh[i], v_LBSKh[i], kind)
                    for place, i in enumerate(numbers)
                ]
                caches[kind] = jax.tree.map(lambda *parts: Unstacked(parts), *new)
            else:  # of one kind all layers: nothing is picked out
                k, v = (x if len(numbers) == len(kinds) else x[jnp.asarray(numbers)] for x in (k_LBSKh, v_LBSKh))
                caches[kind] = written(slots.caches[kind], k, v, kind)
        return self.final_norm(x_BSD), caches

    def turns(self, positions_BS: jax.Array) -> dict[LayerKind, tuple[jax.Array, jax.Array]]:
        """Rotary cosines and sines at these positions, by kind of layer."""
        # In order of first use, not a set's: every process must trace the same program.
        return {kind: rope_turns(positions_BS, self.config, kind) for kind in dict.fromkeys(self.config.layer_kinds)}
