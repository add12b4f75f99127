"""What GGUF and Hugging Face call the same things: one table for each architecture, for reading and for writing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

ROPE_FREQS = "rope_freqs.weight"
"""Of llama3's scaled rotary frequencies: by what each is divided."""


@dataclass(frozen=True)
class Row:
    """One tensor of a GGUF file, and that of a Hugging Face checkpoint; with `{layer}`, one for each layer."""

    gguf: str
    huggingface: str
    """With `{expert}`, one for each expert; GGUF has them stacked, as (E, ...)."""
    heads: Literal["query", "key"] | None = None
    """llama.cpp rotates neighbours where Transformers rotates halves: rows within these heads are in its order."""
    plus_one: bool = False
    """GGUF stores 1 + what Transformers stores."""


@dataclass(frozen=True)
class Key:
    """A metadata key (without the architecture before it), the key of config.json, and the field of ModelConfig."""

    gguf: str
    huggingface: str
    field: str
    kind: type = int
    default: Any = None
    """What llama.cpp takes where the key is absent; None where it must be there."""


@dataclass(frozen=True)
class Architecture:
    """A model family as llama.cpp names it."""

    rows: tuple[Row, ...]
    families: Mapping[str, str]
    """Transformers' `model_type`s that are this, and the class of each."""
    keys: tuple[Key, ...] = ()
    """Beyond `KEYS`."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says of every such model."""
    window_pattern: int | None = None
    """Every so many layers one is global, the others are sliding."""
    grouped_heads: bool = True
    """Whether llama.cpp lets query heads share a key head in it."""
    wide_scale_layers: int | None = None
    """The number of layers by which llama.cpp knows the model whose query scale is by hidden_size / num_heads."""


KEYS = (
    Key("context_length", "max_position_embeddings", "max_position"),
    Key("embedding_length", "hidden_size", "hidden_size"),
    Key("block_count", "num_hidden_layers", "num_layers"),
    Key("feed_forward_length", "intermediate_size", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads", "num_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "norm_eps", float),
    Key("rope.freq_base", "rope_theta", "rope_theta", float, 10000.0),
)


def _expert_keys(count: str) -> tuple[Key, ...]:
    return (
        Key("expert_count", count, "moe.num_experts"),
        Key("expert_used_count", "num_experts_per_tok", "moe.experts_per_token"),
    )


_HF, _BLK = "model.layers.{layer}", "blk.{layer}"


def _attention(*, permuted: bool = False) -> tuple[Row, ...]:
    heads = ("query", "key", None, None) if permuted else (None,) * 4
    names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    return tuple(
        Row(f"{_BLK}.{ours}.weight", f"{_HF}.self_attn.{theirs}.weight", heads=kind)  # type: ignore[arg-type]
        for (ours, theirs), kind in zip(names.items(), heads)
    )


def _ends(*, plus_one: bool = False) -> tuple[Row, ...]:
    return (
        Row("token_embd.weight", "model.embed_tokens.weight"),
        Row("output_norm.weight", "model.norm.weight", plus_one=plus_one),
        Row("output.weight", "lm_head.weight"),
        Row(f"{_BLK}.attn_norm.weight", f"{_HF}.input_layernorm.weight", plus_one=plus_one),
    )


def _head_norms(*, plus_one: bool = False) -> tuple[Row, ...]:
    return tuple(
        Row(f"{_BLK}.attn_{head}_norm.weight", f"{_HF}.self_attn.{head}_norm.weight", plus_one=plus_one)
        for head in ("q", "k")
    )


def _experts(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    names = {"gate": gate, "up": up, "down": down}
    return (
        Row(f"{_BLK}.ffn_gate_inp.weight", f"{_HF}.{router}.weight"),
        *(Row(f"{_BLK}.ffn_{ours}_exps.weight", f"{_HF}.{theirs}.weight") for ours, theirs in names.items()),
    )


_MLP_NORM = (Row(f"{_BLK}.ffn_norm.weight", f"{_HF}.post_attention_layernorm.weight"),)
_GEMMA_NORMS = (
    Row(f"{_BLK}.post_attention_norm.weight", f"{_HF}.post_attention_layernorm.weight", plus_one=True),
    Row(f"{_BLK}.ffn_norm.weight", f"{_HF}.pre_feedforward_layernorm.weight", plus_one=True),
    Row(f"{_BLK}.post_ffw_norm.weight", f"{_HF}.post_feedforward_layernorm.weight", plus_one=True),
)
_MLP = tuple(Row(f"{_BLK}.ffn_{name}.weight", f"{_HF}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
_EXPERTS = _experts("mlp.gate", *(f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down")))
_MIXTRAL = _experts("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{expert}}.w{i}" for i in (1, 3, 2)))
_QKV_BIAS = tuple(Row(f"{_BLK}.attn_{x}.bias", f"{_HF}.self_attn.{x}_proj.bias") for x in ("q", "k", "v"))

_SILU = {"hidden_act": "silu", "attention_bias": False}
_GLOBAL = {"use_sliding_window": False, "sliding_window": None}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_WINDOW = Key("attention.sliding_window", "sliding_window", "sliding_window")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        (*_ends(), *_attention(permuted=True), *_MLP_NORM, *_MLP, *_MIXTRAL),
        {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"},
        constants=_SILU | {"mlp_bias": False},
    ),
    "qwen2": Architecture(
        (*_ends(), *_attention(), *_QKV_BIAS, *_MLP_NORM, *_MLP),
        {"qwen2": "Qwen2ForCausalLM"},
        constants={"hidden_act": "silu"} | _GLOBAL,
    ),
    "qwen3": Architecture(
        (*_ends(), *_attention(), *_head_norms(), *_MLP_NORM, *_MLP),
        {"qwen3": "Qwen3ForCausalLM"},
        constants=_SILU | _GLOBAL,
    ),
    "qwen3moe": Architecture(
        (*_ends(), *_attention(), *_head_norms(), *_MLP_NORM, *_EXPERTS),
        {"qwen3_moe": "Qwen3MoeForCausalLM"},
        (
            *_expert_keys("num_experts"),
            # Before `KEYS`' feed_forward_length, which no layer has.
            Key("expert_feed_forward_length", "moe_intermediate_size", "intermediate_size"),
        ),
        # llama.cpp normalises the weights of a token's experts in this family, and not in OLMoE.
        _SILU | _GLOBAL | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": Architecture(
        (*_ends(), *_attention(), *_head_norms(), *_MLP_NORM, *_EXPERTS),
        {"olmoe": "OlmoeForCausalLM"},
        _expert_keys("num_experts"),
        _SILU | {"norm_topk_prob": False, "clip_qkv": None},
        grouped_heads=False,
    ),
    "gemma2": Architecture(
        (*_ends(plus_one=True), *_attention(), *_GEMMA_NORMS, *_MLP),
        {"gemma2": "Gemma2ForCausalLM"},
        (
            _WINDOW,
            Key("attn_logit_softcapping", "attn_logit_softcapping", "attention_softcap", float, 50.0),
            Key("final_logit_softcapping", "final_logit_softcapping", "final_softcap", float, 30.0),
        ),
        _GEMMA,
        window_pattern=2,
        wide_scale_layers=46,
    ),
    "gemma3": Architecture(
        (*_ends(plus_one=True), *_attention(), *_head_norms(plus_one=True), *_GEMMA_NORMS, *_MLP),
        {"gemma3_text": "Gemma3ForCausalLM"},
        (_WINDOW, Key("rope.freq_base_swa", "rope_local_base_freq", "rope_local_theta", float, 10000.0)),
        _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        window_pattern=6,
        wide_scale_layers=62,
    ),
}
"""By `general.architecture`. Names and keys are those of gguf's constants.py and llama.cpp's convert_hf_to_gguf.py."""

MIXTRAL_KEYS = _expert_keys("num_local_experts")


def template(name: str) -> tuple[str, int | None]:
    """A GGUF tensor's name with `{layer}` in place of its layer, and the layer."""
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name)
    return (f"blk.{{layer}}.{match[2]}", int(match[1])) if match else (name, None)


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k (whole heads of them) from llama.cpp's order, in which a rotation turns neighbours, to that of
    Transformers, in which it turns row i of the first half with row i of the second."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_halves`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """By what llama3's scaling divides each rotary frequency, as (head_dim / 2,) f32."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    return (1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))).astype(np.float32)
