"""What is particular to each family of models: one table, by which checkpoints are read and written.

No arrays here: recipes are read by it without JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One parameter of ours and the tensor in a checkpoint that it is; with `{layer}` or `{expert}`, the tensors."""

    path: str
    """Ours, for example `layers.mlp.up.kernel`."""
    tensor: str
    """Theirs, for example `model.layers.{layer}.mlp.up_proj.weight`."""
    transpose: bool = False
    """torch.nn.Linear stores (out, in), we store (in, out)."""


def _linear(path: str, tensor: str) -> Row:
    return Row(f"{path}.kernel", f"{tensor}.weight", transpose=True)


_LAYER = "model.layers.{layer}"
_COMMON = (
    Row("embedding.table", "model.embed_tokens.weight"),
    _linear("layers.attention.query", f"{_LAYER}.self_attn.q_proj"),
    _linear("layers.attention.key", f"{_LAYER}.self_attn.k_proj"),
    _linear("layers.attention.value", f"{_LAYER}.self_attn.v_proj"),
    _linear("layers.attention.output", f"{_LAYER}.self_attn.o_proj"),
    Row("layers.attention.query.bias", f"{_LAYER}.self_attn.q_proj.bias"),
    Row("layers.attention.key.bias", f"{_LAYER}.self_attn.k_proj.bias"),
    Row("layers.attention.value.bias", f"{_LAYER}.self_attn.v_proj.bias"),
    Row("layers.attention.query_norm.scale", f"{_LAYER}.self_attn.q_norm.weight"),
    Row("layers.attention.key_norm.scale", f"{_LAYER}.self_attn.k_norm.weight"),
    Row("layers.attention_norm.scale", f"{_LAYER}.input_layernorm.weight"),
    Row("final_norm.scale", "model.norm.weight"),
    _linear("head", "lm_head"),
)
# "post_attention_layernorm" comes after the residual sum in most families, and before it in Gemma.
_PRE_NORMS = (Row("layers.mlp_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),)
_POST_NORMS = (
    Row("layers.attention_post_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),
    Row("layers.mlp_norm.scale", f"{_LAYER}.pre_feedforward_layernorm.weight"),
    Row("layers.mlp_post_norm.scale", f"{_LAYER}.post_feedforward_layernorm.weight"),
)
_MLP = (
    _linear("layers.mlp.gate", f"{_LAYER}.mlp.gate_proj"),
    _linear("layers.mlp.up", f"{_LAYER}.mlp.up_proj"),
    _linear("layers.mlp.down", f"{_LAYER}.mlp.down_proj"),
)
_EXPERTS = (
    _linear("layers.mlp.router", f"{_LAYER}.mlp.gate"),
    _linear("layers.mlp.gate", f"{_LAYER}.mlp.experts.{{expert}}.gate_proj"),
    _linear("layers.mlp.up", f"{_LAYER}.mlp.experts.{{expert}}.up_proj"),
    _linear("layers.mlp.down", f"{_LAYER}.mlp.experts.{{expert}}.down_proj"),
)
_MIXTRAL_EXPERTS = (
    _linear("layers.mlp.router", f"{_LAYER}.block_sparse_moe.gate"),
    _linear("layers.mlp.gate", f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w1"),
    _linear("layers.mlp.up", f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w3"),
    _linear("layers.mlp.down", f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w2"),
)
_DENSE_ROWS = _COMMON + _PRE_NORMS + _MLP

Sliding = Literal["never", "always", "from", "every"]


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies without its config.json saying so, and how its tensors are named."""

    architecture: str
    """Transformers' class."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of config.json where a key is absent: those of Transformers' config class."""
    rows: tuple[Row, ...] = _DENSE_ROWS
    """Every parameter that a model of it may have."""
    sliding: Sliding = "never"
    """Which layers have a window where `sliding_window` is set: none, all, those from `max_window_layers` on, or all
    but every nth; the last two unless `layer_types` says so layer by layer."""
    writes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are written with these values, for readers that ask for them."""
    reads: frozenset[str] = frozenset()
    """Keys of config.json that some families have, and this one does; in another they say nothing."""


_GEMMA = {"zero_centered_norm": True, "post_norms": True, "scale_embeddings": True}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_ROWS = _COMMON + _POST_NORMS + _MLP
_MOE_ROWS = _COMMON + _PRE_NORMS + _EXPERTS
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_NO_BIAS = {"attention_bias": False}
_BIAS_READS = frozenset({"attention_bias"})
_WINDOW_READS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})
_MOE_READS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"})
_OWN_MOE_READS = _BIAS_READS | _MOE_READS | {"norm_topk_prob"}
_GEMMA_READS = _BIAS_READS | {
    *("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    "use_bidirectional_attention",
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", writes={**_NO_BIAS, "mlp_bias": False}, reads=_BIAS_READS | {"mlp_bias"}),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"sliding_window": 4096},
        sliding="always",
        reads=frozenset({"sliding_window"}),
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, _QWEN_WINDOW, sliding="from", reads=_WINDOW_READS),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": True},
        {**_QWEN_WINDOW, "head_dim": 128},
        sliding="from",
        writes=_NO_BIAS,
        reads=_BIAS_READS | _WINDOW_READS,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"moe": {"normalize_weights": True}},
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        rows=_COMMON + _PRE_NORMS + _MIXTRAL_EXPERTS,
        sliding="always",
        reads=_MOE_READS | {"sliding_window"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True, "moe": {}},
        {
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        rows=_MOE_ROWS,
        sliding="always",
        writes={**_NO_BIAS, "decoder_sparse_step": 1, "mlp_only_layers": []},
        # Its models have max_window_layers, by which no layer of theirs goes.
        reads=_OWN_MOE_READS | _WINDOW_READS | {"moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {"qk_norm": "all_heads", "moe": {}},
        {"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5},
        rows=_MOE_ROWS,
        writes={**_NO_BIAS, "clip_qkv": None},
        reads=_OWN_MOE_READS | {"clip_qkv"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA,
        _GEMMA_DEFAULTS
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        rows=_GEMMA_ROWS,
        sliding="every",
        writes=_NO_BIAS,
        reads=_GEMMA_READS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"qk_norm": True},
        _GEMMA_DEFAULTS | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        rows=_GEMMA_ROWS,
        sliding="every",
        writes=_NO_BIAS,
        reads=_GEMMA_READS | {"sliding_window_pattern", "rope_local_base_freq"},
    ),
}
DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""Values of config.json where a key is absent, in every family that does not say otherwise."""
OF_SOME = frozenset[str]().union(*(family.reads for family in FAMILIES.values()))
"""Keys of config.json that some families have, and others do not."""
