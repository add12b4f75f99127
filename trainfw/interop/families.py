"""Table of the model families: their configs and the names of their tensors, for reading and writing checkpoints.

No arrays here: recipes are read by it without JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One of our parameters and its tensor in a checkpoint; with `{layer}` or `{expert}`, its tensors."""

    path: str
    """Path of the parameter, for example `layers.mlp.up.kernel`."""
    tensor: str
    """Name in the checkpoint, for example `model.layers.{layer}.mlp.up_proj.weight`."""
    transpose: bool = False
    """Flag: the checkpoint stores (out, in), as torch.nn.Linear does, where our kernels are (in, out)."""


_LAYER = "model.layers.{layer}"


def _linears(path: str, tensor: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Return the rows of linear maps: `names` from our names below `path` to the checkpoint's below `tensor`."""
    return tuple(
        Row(f"{path}.{own}.kernel", f"{_LAYER}.{tensor}.{name}.weight", transpose=True) for own, name in names.items()
    )


def _norms(names: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(Row(f"layers.{own}.scale", f"{_LAYER}.{name}.weight") for own, name in names.items())


_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_COMMON = (
    Row("embedding.table", "model.embed_tokens.weight"),
    *_linears("layers.attention", "self_attn", _PROJECTIONS | {"output": "o_proj"}),
    *(Row(f"layers.attention.{own}.bias", f"{_LAYER}.self_attn.{name}.bias") for own, name in _PROJECTIONS.items()),
    *_norms({"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}),
    *_norms({"attention_norm": "input_layernorm"}),
    Row("final_norm.scale", "model.norm.weight"),
    Row("head.kernel", "lm_head.weight", transpose=True),
)
# "post_attention_layernorm" comes after the residual sum in most families, and before it in Gemma.
_PRE_NORMS = _norms({"mlp_norm": "post_attention_layernorm"})
_POST_NORMS = _norms(
    {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)
_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MLP = _linears("layers.mlp", "mlp", _GATED)
_EXPERTS = (*_linears("layers.mlp", "mlp", {"router": "gate"}), *_linears("layers.mlp", "mlp.experts.{expert}", _GATED))
_MIXTRAL_EXPERTS = (
    *_linears("layers.mlp", "block_sparse_moe", {"router": "gate"}),
    *_linears("layers.mlp", "block_sparse_moe.experts.{expert}", {"gate": "w1", "up": "w3", "down": "w2"}),
)
_DENSE_ROWS = _COMMON + _PRE_NORMS + _MLP

Sliding = Literal["never", "always", "from", "every"]


@dataclass(frozen=True)
class Family:
    """A `model_type`: the facts that its config.json leaves out, and the names of its tensors."""

    architecture: str
    """Name of Transformers' class."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values for absent keys of config.json: those of Transformers' config class."""
    rows: tuple[Row, ...] = _DENSE_ROWS
    """Every parameter that a model of this family may have."""
    sliding: Sliding = "never"
    """Layers with a window, if `sliding_window` is set: none, all, those from `max_window_layers` on, or all but every
    nth. In the last two cases `layer_types` may list them instead."""
    writes: Mapping[str, Any] = field(default_factory=dict)
    """Keys and values that are always written to config.json, for readers that require them."""
    reads: frozenset[str] = frozenset()
    """Keys of config.json that count in this family, but not in all."""


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
        "MistralForCausalLM", defaults={"sliding_window": 4096}, sliding="always", reads=frozenset({"sliding_window"})
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
        {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
        | {"use_sliding_window": False, "sliding_window": 4096},
        rows=_MOE_ROWS,
        sliding="always",
        writes={**_NO_BIAS, "decoder_sparse_step": 1, "mlp_only_layers": []},
        # Its models have max_window_layers, which no layer depends on.
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
"""Values for absent keys of config.json, in every family without a value of its own."""
FAMILY_KEYS = frozenset[str]().union(*(family.reads for family in FAMILIES.values()))
"""Keys of config.json that count in some families only."""
