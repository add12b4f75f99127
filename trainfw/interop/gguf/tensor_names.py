"""Names of tensors and metadata in GGUF files, and in Hugging Face checkpoints: tables for reading and for writing."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trainfw.formats import gguf_library
from trainfw.interop.families import FAMILIES

ROPE_FREQS = "rope_freqs.weight"
"""Tensor of the divisors of rotary frequencies, in models with llama3's scaling."""


@dataclass(frozen=True)
class Row:
    """One tensor of a GGUF file and its name in a Hugging Face checkpoint; with `{layer}`, one for each layer."""

    gguf: str
    huggingface: str
    """Name in the checkpoint; with `{expert}`, one for each expert, where GGUF has one tensor (E, ...)."""
    heads: Literal["query", "key"] | None = None
    """Heads whose rows are in llama.cpp's order: it rotates neighbours where Transformers rotates halves."""
    plus_one: bool = False
    """Flag: GGUF stores 1 + the checkpoint's values."""


@dataclass(frozen=True)
class Key:
    """A metadata key (without the architecture before it), the key of config.json, and the field of ModelConfig."""

    gguf: str
    huggingface: str
    field: str
    kind: type = int
    default: Any = None
    """Value that llama.cpp takes for an absent key; None where the key must be there."""


@dataclass(frozen=True)
class Architecture:
    """A model family as llama.cpp names it."""

    families: tuple[str, ...]
    """Transformers' `model_type`s of this architecture."""
    keys: tuple[Key, ...] = ()
    """Keys besides `KEYS`."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys and values in the config.json of every such model."""
    window_pattern: int | None = None
    """Number of layers of which the last is global and the others are sliding."""
    grouped_heads: bool = True
    """Flag: llama.cpp lets query heads share a key head."""
    wide_scale_layers: int | None = None
    """Number of layers of the one model whose query scale is by hidden_size / num_heads, as llama.cpp knows it."""


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


_SILU = {"hidden_act": "silu", "attention_bias": False}
_GLOBAL = {"use_sliding_window": False, "sliding_window": None}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_WINDOW = Key("attention.sliding_window", "sliding_window", "sliding_window")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mistral", "mixtral"), constants=_SILU | {"mlp_bias": False}),
    "qwen2": Architecture(("qwen2",), constants={"hidden_act": "silu"} | _GLOBAL),
    "qwen3": Architecture(("qwen3",), constants=_SILU | _GLOBAL),
    "qwen3moe": Architecture(
        ("qwen3_moe",),
        (
            *_expert_keys("num_experts"),
            # Before `KEYS`' feed_forward_length, which no layer has.
            Key("expert_feed_forward_length", "moe_intermediate_size", "intermediate_size"),
        ),
        # llama.cpp normalises the weights of a token's experts in this family, and not in OLMoE.
        _SILU | _GLOBAL | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": Architecture(
        ("olmoe",),
        _expert_keys("num_experts"),
        _SILU | {"norm_topk_prob": False, "clip_qkv": None},
        grouped_heads=False,
    ),
    "gemma2": Architecture(
        ("gemma2",),
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
        ("gemma3_text",),
        (_WINDOW, Key("rope.freq_base_swa", "rope_local_base_freq", "rope_local_theta", float, 10000.0)),
        _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        window_pattern=6,
        wide_scale_layers=62,
    ),
}
"""Architectures by `general.architecture`; keys as in gguf's constants.py and llama.cpp's convert_hf_to_gguf.py."""


def keys_of(architecture: str, family: str) -> tuple[Key, ...]:
    """Return the metadata keys of a family's models in a GGUF file of an architecture."""
    mixtral = _expert_keys("num_local_experts") if family == "mixtral" else ()
    return (*KEYS, *ARCHITECTURES[architecture].keys, *mixtral)


@functools.cache
def rows_of(architecture: str, family: str) -> tuple[Row, ...]:
    """Return the tensors of a family's models in a GGUF file of an architecture, by the `gguf` library's names."""
    gguf = gguf_library()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, 1)
    fields = FAMILIES[family].fields
    rows = []
    for row in FAMILIES[family].rows:
        module, _, leaf = row.path.rpartition(".")
        module = module.rpartition(".")[2]
        if leaf == "bias" and "qkv_bias" not in fields:
            continue
        if module in ("query_norm", "key_norm") and "qk_norm" not in fields:
            continue
        name, _, suffix = row.tensor.rpartition(".")
        # The library has no name for a head of Gemma, whose published models all tie it.
        known = name.replace("{layer}", "0").replace(".{expert}", "")
        stored = "output" if name == "lm_head" else names.get_name(known)
        assert stored is not None, f"{architecture}: the gguf library has no name for {row.tensor}"
        heads: Any = module if architecture == "llama" and module in ("query", "key") else None
        plus_one = leaf == "scale" and "zero_centered_norm" in fields
        rows.append(Row(f"{stored.replace('blk.0.', 'blk.{layer}.')}.{suffix}", row.tensor, heads, plus_one))
    return tuple(rows)


def template(name: str) -> tuple[str, int | None]:
    """Return a GGUF tensor's name with `{layer}` in place of its layer, and the layer."""
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name)
    return (f"blk.{{layer}}.{match[2]}", int(match[1])) if match else (name, None)


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Bring rows of q or k (whole heads) from llama.cpp's order to that of Transformers.

    A rotation turns neighbours in llama.cpp; in Transformers, row i of the first half with row i of the second.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `to_halves`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """Return the divisor of each rotary frequency in llama3's scaling, f32 (head_dim / 2,)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    return (1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))).astype(np.float32)
