from __future__ import annotations

import functools

from trainfw.models.decoder.config import ModelConfig
from trainfw.models.layer_shapes import Experts, FeedForward, ModelShapes, Weight


@functools.lru_cache(maxsize=8)
def decoder_shapes(config: ModelConfig) -> ModelShapes:
    """Return every parameter of a decoder, as the default rules shard it, and the sizes of its products."""
    moe, inner = config.moe, config.intermediate_size
    feed_forwards: tuple[FeedForward, ...] = (FeedForward(inner),)
    if moe is not None:
        factor = moe.capacity_factor if moe.dispatch == "capacity" else 1.0
        feed_forwards = (FeedForward(inner, Experts(moe.num_experts, moe.experts_per_token, factor)),)
        if moe.shared_intermediate_size is not None:
            feed_forwards += (FeedForward(moe.shared_intermediate_size),)
    return ModelShapes(
        weights=tuple(_weights(config)),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        feed_forwards=feed_forwards,
    )


def _weights(config: ModelConfig) -> list[Weight]:
    width, layers = config.hidden_size, config.num_layers
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = [Weight("table", (config.vocab_size, width), 2)]
    if not config.tie_embeddings:
        found.append(Weight("table", (width, config.vocab_size), 2))
    found += [Weight("layers.kernel", (layers, width, out), 2) for out in (heads, kv_heads, kv_heads)]
    found += [Weight("layers.kernel", (layers, heads, width), 2)]
    dense: int | None = config.intermediate_size
    if config.moe is not None:
        experts, inner = config.moe.num_experts, config.intermediate_size
        found += [Weight("layers.router", (layers, width, experts), 3)]
        found += [Weight("layers.experts", (layers, experts, width, inner), 2)] * 2
        found += [Weight("layers.experts", (layers, experts, inner, width), 2)]
        dense = config.moe.shared_intermediate_size
    if dense is not None:
        found += [Weight("layers.kernel", (layers, width, dense), 2)] * 2
        found += [Weight("layers.kernel", (layers, dense, width), 2)]
    if config.qkv_bias:
        found += [Weight("layers.bias", (layers, out), 1) for out in (heads, kv_heads, kv_heads)]
    found += [Weight("layers.scale", (layers, width), 0)] * (4 if config.post_norms else 2)
    if config.qk_norm:
        found += [Weight("layers.scale", (layers, config.head_dim), 0)] * 2
    return [*found, Weight("scale", (width,), 0)]
