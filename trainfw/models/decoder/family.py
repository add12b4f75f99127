from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trainfw.models.decoder.config import ModelConfig
from trainfw.models.decoder.flops import flops_per_token
from trainfw.models.decoder.shapes import decoder_shapes
from trainfw.models.family import Family, Limit, ModelOptions
from trainfw.models.layer_shapes import ModelShapes

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
        from trainfw.models.common.moe import dispatch_problem, routing_problem

        if problem := dispatch_problem(config, backend):
            yield "moe.dispatch", problem
        if problem := routing_problem(config, backend):
            yield "moe.experts_per_token", problem

    def flops_per_token(self, config: ModelConfig, sequence_length: int) -> float:
        return flops_per_token(config, sequence_length)

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
        return decoder_shapes(config)
