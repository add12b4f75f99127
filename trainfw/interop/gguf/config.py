"""Conversion of a GGUF file's metadata to a config.json. It needs neither jax nor the tensors."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.config import SMALLEST
from trainfw.errors import UserError, short
from trainfw.formats import Header, known_or_refuse, read_header
from trainfw.interop.families import FAMILIES
from trainfw.interop.gguf import tensor_names

MAX_LAYERS, MAX_EXPERTS = 10_000, 10_000

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Rotary scaling of Llama 3.1, 3.2 and 3.3. GGUF files hold the divisors that it gives, and not these values."""
TOKEN_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""Roles of tokens in config.json (`bos_token_id`), and their names in `tokenizer.ggml`."""

LLAMA3_FACTORS = (8.0, 32.0)
"""Scaling factors: of Llama 3.1 and 3.3, and of 3.2."""

_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def gguf_config(file: Path | str) -> dict[str, Any]:
    """Read the config.json of a GGUF file's model, as Transformers would write it.

    Raises UserError for an architecture or a feature that trainfw does not have, and for metadata that is missing or
    makes no sense.
    """
    header = read_header(file)
    if (kind := header.get("general.type", str, "model")) != "model":
        raise UserError(f"{header.file}: general.type = {short(kind)}: expected a model's file")
    if unread := _unread_keys(header):
        warnings.warn(f"{header.file}: not read: {', '.join(unread)[:400]}", stacklevel=1)  # once, whoever reads it
    stored, divisors = header.tensors.get(tensor_names.ROPE_FREQS), None
    if stored is not None:
        if stored.type != "F32" or len(stored.shape) != 1 or stored.nbytes > 1 << 20:
            found = f"tensor {stored.name} is {stored.type} of shape {stored.shape}"
            raise UserError(f"{header.file}: {found}: expected F32")
        divisors = np.fromfile(stored.file, "<f4", stored.shape[0], offset=stored.offset)
    return config_of(header, divisors)


_OTHER_KEYS = (
    *("vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.sliding_window", "expert_count", "expert_used_count", "rope.dimension_count", "rope.scaling.type"),
    # The last two are of models that were trained with yarn, which is refused.
    *("rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
)
"""Keys about the model, besides those of the tables, that are read or compute nothing."""
_IGNORED = {
    # llama.cpp reads these for other architectures: in its logits of a Llama, they changed nothing.
    *("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attention.temperature_scale"),
    *("attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
    # The architecture decides about routers, whatever these say.
    *("expert_gating_func", "expert_weights_norm", "expert_weights_scale"),
    # Layout of tensors in the file, and results of embedding models.
    *("tensor_data_layout", "pooling_type"),
}
_WITHOUT_EFFECT = {"attention.causal": (True,), "rope.scaling.attn_factor": (1.0,)}
"""Values at which keys that are not read change nothing; for other keys these are 0, false and empty text."""


def _unread_keys(header: Header) -> list[str]:
    """Return the file's keys about its model that count neither here nor in llama.cpp.

    Raises UserError for other unknown keys that are set: llama.cpp may compute another model by them.
    """
    name, architecture = header.architecture, architecture_of(header)
    read = {*_OTHER_KEYS, *(key.gguf for key in (*tensor_names.KEYS, *architecture.keys))}
    without_effect = _WITHOUT_EFFECT | {"attention.sliding_window_pattern": (0, architecture.window_pattern)}
    unread = []
    for key, value in header.metadata.items():
        own = key.removeprefix(f"{name}.")
        if own == key or own in read:
            continue
        if own in _IGNORED:
            unread.append(key[:80])
        elif not isinstance(value, int | float | str) or value not in without_effect.get(own, (0, "")):
            raise UserError(f"{header.file}: {key[:80]} = {short(value)} is not supported")
    return sorted(unread)


def architecture_of(header: Header) -> tensor_names.Architecture:
    """Return the table of a file's architecture. Raises UserError, with the architectures, for an unknown one."""
    return known_or_refuse(header, "general.architecture", tensor_names.ARCHITECTURES)


def config_of(header: Header, rope_freqs: np.ndarray | None) -> dict[str, Any]:
    """Return the config.json for a header; see `gguf_config`. `rope_freqs` is the tensor of this name, if any."""
    name, architecture = header.architecture, architecture_of(header)
    family = _family(header, architecture)
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **architecture.constants,
    }
    for key in tensor_names.keys_of(name, family):
        if key.gguf == "feed_forward_length" and name == "qwen3moe":
            # The size of layers that are no mixture, of which there are none: some files leave it out.
            config[key.huggingface] = header.size(f"{name}.{key.gguf}", header.size(f"{name}.embedding_length"))
            continue
        config[key.huggingface] = _value(header, f"{name}.{key.gguf}", key)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    experts = config.get("num_experts", config.get("num_local_experts", 0))
    for count, value, limit in (("block_count", layers, MAX_LAYERS), ("expert_count", experts, MAX_EXPERTS)):
        if value > limit:
            raise UserError(f"{header.file}: {name}.{count} = {value}: expected {limit} at most")
    config["num_key_value_heads"] = header.size(f"{name}.attention.head_count_kv", heads)
    config["head_dim"] = _head_dim(header, config["hidden_size"], heads)
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise UserError(f"{header.file}: no tensor token_embd.weight")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["initializer_range"] = 0.02
    config["rope_scaling"] = _rope_scaling(header, rope_freqs, config)
    if architecture.window_pattern is not None:
        config["layer_types"] = [
            "sliding_attention" if (i + 1) % architecture.window_pattern else "full_attention" for i in range(layers)
        ]
        wide = layers == architecture.wide_scale_layers
        scalar = config["hidden_size"] / heads if wide else config["head_dim"]
        config["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    elif name == "llama":
        window = header.get(f"{name}.attention.sliding_window", int, 0)
        if window or family != "llama":
            config["sliding_window"] = window or None
    for role, ggml_role in TOKEN_ROLES.items():
        id_ = header.get(f"tokenizer.ggml.{ggml_role}_token_id", int, config["vocab_size"])
        config[f"{role}_token_id"] = id_ if 0 <= id_ < config["vocab_size"] else None
    sizes: Counter[str] = Counter()  # numbers of elements, by the dtype as which `GGUFTensors` reads them
    for stored in header.tensors.values():
        sizes[_DTYPES.get(stored.type, "float32")] += math.prod(stored.shape)
    config["torch_dtype"] = sizes.most_common(1)[0][0]
    return config


def _family(header: Header, architecture: tensor_names.Architecture) -> str:
    """Return Transformers' model_type."""
    if header.architecture != "llama":
        return architecture.families[0]
    if header.get("llama.expert_count", int, 0):
        return "mixtral"
    mistral = "mistral" in header.get("general.name", str, "").lower()
    return "mistral" if mistral or header.get("llama.attention.sliding_window", int, 0) else "llama"


def _value(header: Header, name: str, key: tensor_names.Key) -> Any:
    if key.kind is int:
        return header.size(name, key.default)
    value = header.get(name, float, key.default)
    if value < SMALLEST:
        raise UserError(f"{header.file}: {name} = {value}: expected more than 0")
    return shortest(value)


def shortest(value: float) -> float:
    """Return the number with the fewest digits that equals `value` in 32 bits: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _head_dim(header: Header, hidden: int, heads: int) -> int:
    name = header.architecture
    if f"{name}.attention.key_length" not in header.metadata and hidden % heads:
        raise UserError(f"{header.file}: {name}.embedding_length = {hidden} does not divide by {heads} heads")
    head_dim = header.size(f"{name}.attention.key_length", hidden // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := header.size(f"{name}.{key}", head_dim)) != head_dim:
            raise UserError(f"{header.file}: {name}.{key} = {size} is not supported: heads of {head_dim}")
    if head_dim % 2:
        raise UserError(f"{header.file}: heads of {head_dim}: rotary embeddings turn pairs")
    return head_dim


def _rope_scaling(header: Header, rope_freqs: np.ndarray | None, config: dict[str, Any]) -> dict[str, Any] | None:
    name = header.architecture
    kind = header.get(f"{name}.rope.scaling.type", str, "none")
    factors = [f"{name}.rope.{key}" for key in ("scaling.factor", "scale_linear")]
    values = [header.get(key, float) for key in factors if key in header.metadata]
    if len(set(values)) > 1:
        both = f"{factors[0]} = {values[0]:g}, but {factors[1]} = {values[1]:g}"
        raise UserError(f"{header.file}: {both}: one of them only")
    factor = values[0] if values else 1.0
    if kind not in ("none", "linear"):
        given = f"{name}.rope.scaling.type = {short(kind)}"
        raise UserError(f"{header.file}: {given} is not supported; one of: none, linear")
    if factor < 0:
        raise UserError(f"{header.file}: {name}.rope.scaling.factor = {factor}: expected 0 or more")
    # llama.cpp takes a factor without a type as linear, and 0 as none.
    scaled = f"{name}.rope.scaling.type" not in header.metadata or kind == "linear"
    linear = {"rope_type": "linear", "factor": shortest(factor)} if scaled and factor not in (0.0, 1.0) else None
    if rope_freqs is None:
        return linear
    head_dim, theta = config["head_dim"], config["rope_theta"]
    if rope_freqs.shape == (head_dim // 2,) and linear is None:
        if (rope_freqs == 1).all():
            return None
        for candidate in LLAMA3_FACTORS:
            expected = tensor_names.llama3_divisors(head_dim, theta, candidate, *LLAMA3.values())
            if np.allclose(rope_freqs, expected, rtol=1e-4, atol=0):
                return {"rope_type": "llama3", "factor": candidate, **LLAMA3}
    raise UserError(
        f"{header.file}: {tensor_names.ROPE_FREQS} is not what llama3's rotary scaling gives for heads of {head_dim} "
        f"and rope.freq_base = {theta:g} with a factor of {' or '.join(f'{f:g}' for f in LLAMA3_FACTORS)}, "
        "the only scaling by frequency that is supported"
    )
