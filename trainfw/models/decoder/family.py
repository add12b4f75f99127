from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trainfw.models.decoder.config import ModelConfig
from trainfw.models.family import Family, Limit, ModelOptions
from trainfw.models.layer_shapes import Experts, FeedForward, ModelShapes, Weight

if TYPE_CHECKING:
    from flax import nnx

    from trainfw.backends import Backend
    from trainfw.models.decoder.model import Transformer


class Decoder(Family):
    """Decoder-only transformers: Llama, Qwen, Mistral, Gemma, OLMoE, by configuration."""

    config = ModelConfig
    decodes: ClassVar[bool] = True

    def build(self, config: ModelConfig, options: ModelOptions, rngs: nnx.Rngs) -> Transformer:
        from trainfw.models.decoder.model import Transformer

        return Transformer(config, options, rngs=rngs)

    def limits(self, config: ModelConfig) -> Iterator[Limit]:
        moe, head_dim, kv_heads = config.moe, config.head_dim, config.num_kv_heads
        if moe is not None:
            yield Limit("moe.num_experts", moe.num_experts, "experts")
        yield Limit("num_heads", config.num_heads, "heads")
        yield Limit("num_kv_heads", kv_heads, "kv_heads", shared=True)
        yield Limit("head_dim", kv_heads * head_dim, "kv_heads")  # where devices share a head, each keeps a part of it
        yield Limit("vocab_size", config.vocab_size, "vocab", pads=True)
        yield Limit("intermediate_size", config.intermediate_size, "mlp")
        if moe is not None and moe.shared_intermediate_size is not None:
            yield Limit("moe.shared_intermediate_size", moe.shared_intermediate_size, "mlp")
        yield Limit("hidden_size", config.hidden_size, "embed")
        if moe is not None:
            yield Limit("hidden_size", config.hidden_size, "expert_embed")

    def unspread(self, config: ModelConfig) -> Mapping[str, str]:
        return {} if config.moe else {"expert": "spreads experts, and the model has none (model.moe); use fsdp"}

    def backend_problems(self, config: ModelConfig, backend: Backend) -> Iterator[tuple[str, str]]:
        from trainfw.models.common.moe import backend_problems

        yield from backend_problems(config, backend)

    def flops_per_token(self, config: ModelConfig, sequence_length: int) -> float:
        """Model FLOPs of training (forward and backward) on one token of sequences of `sequence_length` tokens.

            6 * N + 12 * H * h * (sum over layers of the tokens that a token attends to)

        N counts the parameters that multiply every token: the layers' matrices and the output head, once, tied or
        not; embedding lookups, norms and biases do no matrix product. Of a mixture of experts it counts the router, the
        shared experts and as many experts as a token goes to, never the empty slots or what is dropped. Forward is 2
        FLOPs a parameter, backward twice that. Attention forward is 4 * H * h for each token attended to (2 for the
        scores, 2 for the weighted sum). A causal layer attends to S / 2 tokens on average, one with a window W < S to
        W - W**2 / (2 * S). What remat computes again is never counted.

        Source: PaLM (arXiv:2204.02311), appendix B, with the causal half of the attention square counted rather than
        the whole, as in the scaling book (jax-ml.github.io/scaling-book/transformers).
        """
        D, F, width = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        attention = 2 * D * width + 2 * D * config.num_kv_heads * config.head_dim
        feed_forward = 3 * D * F
        if config.moe is not None:
            shared = config.moe.shared_intermediate_size or 0
            feed_forward = 3 * D * (config.moe.experts_per_token * F + shared) + D * config.moe.num_experts
        matrices = config.num_layers * (attention + feed_forward) + D * config.vocab_size
        attended = 0.0
        for kind in config.layer_kinds:
            window = min(config.sliding_window or sequence_length, sequence_length)
            span = window if kind == "sliding" else sequence_length
            attended += span - span**2 / (2 * sequence_length)
        return 6.0 * matrices + 12.0 * width * attended

    def tiny(self, config: ModelConfig, *, layers: int, tensor: int) -> dict[str, Any]:
        shares_heads = 0 < config.num_kv_heads < tensor
        small: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_layers": layers,
            "num_heads": 4,
            "num_kv_heads": 1 if shares_heads else 2,
            "head_dim": 16,
        }
        if config.sliding_window is not None:
            small["sliding_window"] = 16
        if config.moe is not None:
            small |= {"moe.num_experts": 8, "moe.experts_per_token": min(2, config.moe.experts_per_token)}
            if config.moe.shared_intermediate_size is not None:
                small["moe.shared_intermediate_size"] = 32
        return small

    def shapes(self, config: ModelConfig) -> ModelShapes:
        return _shapes(config)


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> ModelShapes:
    """Return every parameter of a decoder, as the default rules shard it, and the sizes of its products."""
    moe, experts = config.moe, None
    if moe is not None:
        factor = moe.capacity_factor if moe.dispatch == "capacity" else 1.0
        experts = Experts(moe.num_experts, moe.experts_per_token, factor)
    shared = None if moe is None else moe.shared_intermediate_size
    return ModelShapes(
        weights=tuple(_weights(config)),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        feed_forwards=(FeedForward(config.intermediate_size, experts), *([FeedForward(shared)] if shared else ())),
        windows=tuple(config.sliding_window if kind == "sliding" else None for kind in config.layer_kinds),
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
