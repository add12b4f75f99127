"""Hugging Face checkpoints: config.json to `ModelConfig`, and tensor names to and from parameter paths."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from trainfw.errors import UserError, did_you_mean
from trainfw.models import ModelConfig, abstract_model


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
COMMON_ROWS = (
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
    _linear("layers.mlp.gate", f"{_LAYER}.mlp.gate_proj"),
    _linear("layers.mlp.up", f"{_LAYER}.mlp.up_proj"),
    _linear("layers.mlp.down", f"{_LAYER}.mlp.down_proj"),
    Row("layers.attention_norm.scale", f"{_LAYER}.input_layernorm.weight"),
    Row("final_norm.scale", "model.norm.weight"),
    _linear("head", "lm_head"),
)
# "post_attention_layernorm" comes after the residual sum in most families, and before it in Gemma.
PRE_NORM_ROWS = (Row("layers.mlp_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),)
POST_NORM_ROWS = (
    Row("layers.attention_post_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),
    Row("layers.mlp_norm.scale", f"{_LAYER}.pre_feedforward_layernorm.weight"),
    Row("layers.mlp_post_norm.scale", f"{_LAYER}.post_feedforward_layernorm.weight"),
)
# In place of those of a dense `mlp`.
EXPERT_ROWS = (
    _linear("layers.mlp.router", f"{_LAYER}.mlp.gate"),
    _linear("layers.mlp.gate", f"{_LAYER}.mlp.experts.{{expert}}.gate_proj"),
    _linear("layers.mlp.up", f"{_LAYER}.mlp.experts.{{expert}}.up_proj"),
    _linear("layers.mlp.down", f"{_LAYER}.mlp.experts.{{expert}}.down_proj"),
    _linear("layers.mlp.shared.gate", f"{_LAYER}.mlp.shared_experts.gate_proj"),
    _linear("layers.mlp.shared.up", f"{_LAYER}.mlp.shared_experts.up_proj"),
    _linear("layers.mlp.shared.down", f"{_LAYER}.mlp.shared_experts.down_proj"),
)
_MIXTRAL = "block_sparse_moe"
MIXTRAL_ROWS = (
    _linear("layers.mlp.router", f"{_LAYER}.{_MIXTRAL}.gate"),
    _linear("layers.mlp.gate", f"{_LAYER}.{_MIXTRAL}.experts.{{expert}}.w1"),
    _linear("layers.mlp.up", f"{_LAYER}.{_MIXTRAL}.experts.{{expert}}.w3"),
    _linear("layers.mlp.down", f"{_LAYER}.{_MIXTRAL}.experts.{{expert}}.w2"),
)


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies without its config.json saying so."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of config.json where a key is absent: those of Transformers' config class."""


_GEMMA = {"zero_centered_norm": True, "post_norms": True, "scale_embeddings": True}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(defaults={"sliding_window": 4096}),
    "qwen2": Family({"qkv_bias": True}),
    "qwen3": Family({"qk_norm": True}, {"head_dim": 128}),
    "mixtral": Family(
        {"moe": {"normalize_weights": True}},
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    "qwen3_moe": Family(
        {"qk_norm": True, "moe": {}},
        {
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
    ),
    "olmoe": Family(
        {"qk_norm": "all_heads", "moe": {}}, {"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5}
    ),
    "gemma2": Family(
        _GEMMA,
        _GEMMA_DEFAULTS
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        _GEMMA | {"qk_norm": True},
        _GEMMA_DEFAULTS | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
}
_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json, in the form of Transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).

    Raises UserError for a family or a feature that `Transformer` does not have.
    """
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not supported{did_you_mean(model_type, FAMILIES)}")
    hf = {**_DEFAULTS, **FAMILIES[model_type].defaults, **config}
    if missing := [key for key in _REQUIRED if hf.get(key) is None]:
        raise UserError(f"config.json: no {', '.join(missing)}")
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "clip_qkv", "mlp_only_layers"):
        if hf.get(key):
            raise UserError(f"config.json: {key} = {hf[key]} is not supported")
    activation = hf.get("hidden_activation") or hf["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json: activation {activation!r} is not supported; one of: {', '.join(_ACTIVATIONS)}")
    pattern = _period(_layer_kinds(hf))
    fields = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "activation": _ACTIVATIONS[activation],
        "norm_eps": hf["rms_norm_eps"],
        "max_position": hf["max_position_embeddings"],
        "layer_pattern": pattern,
        "sliding_window": hf["sliding_window"] if "sliding" in pattern else None,
        "attention_softcap": hf.get("attn_logit_softcapping"),
        "final_softcap": hf.get("final_logit_softcapping"),
        "init_std": hf["initializer_range"],
        **_rope(hf, local="sliding" in pattern),
        **FAMILIES[model_type].fields,
    }
    if "moe" in fields:
        fields |= _experts(config, hf, fields["moe"])
    if hf.get("head_dim") is not None:
        fields["head_dim"] = hf["head_dim"]
    if hf.get("query_pre_attn_scalar") is not None:
        fields["query_scale"] = hf["query_pre_attn_scalar"] ** -0.5
    return ModelConfig(**fields)


def _experts(config: Mapping[str, Any], hf: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts, whose dispatch is that of Transformers: nothing is dropped."""
    if hf.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"config.json: decoder_sparse_step = {hf['decoder_sparse_step']} is not supported")
    # Transformers 5 writes num_local_experts for every family.
    counts = [source[key] for source in (config, hf) for key in ("num_experts", "num_local_experts") if key in source]
    experts = {
        "num_experts": counts[0],
        "experts_per_token": hf["num_experts_per_tok"],
        "normalize_weights": hf.get("norm_topk_prob", False),
        "dispatch": "dropless",
    }
    return {
        "intermediate_size": hf.get("moe_intermediate_size", hf["intermediate_size"]),
        "moe": {**experts, **moe},
    }


def _layer_kinds(hf: Mapping[str, Any]) -> list[str]:
    """`global` or `sliding` for each layer."""
    layers = range(hf["num_hidden_layers"])
    if hf.get("sliding_window") is None or hf.get("use_sliding_window") is False:
        return ["global" for _ in layers]
    if hf.get("layer_types") is not None:
        names = {"full_attention": "global", "sliding_attention": "sliding"}
        if unknown := set(hf["layer_types"]) - set(names):
            raise UserError(f"config.json: layer_types: {', '.join(sorted(unknown))} is not supported")
        return [names[name] for name in hf["layer_types"]]
    match hf["model_type"]:
        case "gemma2" | "gemma3_text":  # every nth layer is global
            return ["sliding" if (i + 1) % hf["sliding_window_pattern"] else "global" for i in layers]
        case "qwen2" | "qwen3":  # the first are global
            return ["sliding" if i >= hf.get("max_window_layers", 28) else "global" for i in layers]
        case "mistral" | "mixtral" | "qwen3_moe":
            return ["sliding" for _ in layers]
    return ["global" for _ in layers]


def _period(kinds: Sequence[str]) -> list[str]:
    """The shortest list that, repeated, gives `kinds`."""
    lengths = range(1, len(kinds) + 1)
    length = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return list(kinds[:length])


def _rope(hf: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """The rotary fields; `local` says whether there are sliding layers to have a base of their own."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local_rope = {"rope_theta": hf.get("rope_local_base_freq")}
    if "full_attention" in rope:
        local_rope, rope = {**local_rope, **rope["sliding_attention"]}, rope["full_attention"]
    fields: dict[str, Any] = {"rope_theta": rope.get("rope_theta", hf["rope_theta"])}
    if local and local_rope["rope_theta"] is not None:
        fields["rope_local_theta"] = local_rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if local_rope.get("rope_type", "default") != "default" or kind not in ("default", "linear", "llama3"):
        raise UserError(f"config.json: rope_scaling of type {kind!r} is not supported; one of: linear, llama3")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported")
    if kind != "default":
        fields["rope_scaling"] = {"kind": kind, "factor": rope["factor"]}
    if kind == "llama3":
        fields["rope_scaling"] |= {
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_max_position": rope["original_max_position_embeddings"],
        }
    return fields


def rows(config: ModelConfig, *, mixtral: bool = False) -> dict[str, tuple[Row, tuple[int, ...]]]:
    """Every parameter of the model by path: its row, and its shape on our side (stacked over layers and experts).

    `mixtral`: experts have the names that they have in Mixtral, and in no other family.
    """
    norms = POST_NORM_ROWS if config.post_norms else PRE_NORM_ROWS
    experts = () if config.moe is None else MIXTRAL_ROWS if mixtral else EXPERT_ROWS
    table = {row.path: row for row in COMMON_ROWS + norms + experts}
    params = nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))
    paths = {".".join(map(str, path)): param.shape for path, param in params}
    return {path: (table[path], shape) for path, shape in paths.items()}


def params_from_huggingface(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters as nested dicts of f32 arrays, as in `nnx.to_pure_dict`, from a checkpoint's tensors by name.

    Experts are one tensor each, as in files that are published or that `save_pretrained` writes.
    Raises UserError that names the tensors when some are missing, unknown or of another shape.
    """
    wanted = rows(config, mixtral=any(f".{_MIXTRAL}." in name for name in tensors))
    expected = {name for row, _ in wanted.values() for name in _names(row, config).values()}
    if missing := expected - set(tensors):
        raise UserError(f"checkpoint: no tensor {_some(missing)}")
    if extra := {name for name in set(tensors) - expected if not _ignorable(name, config)}:
        raise UserError(f"checkpoint: the model has no place for tensor {_some(extra)}")
    params: dict[str, Any] = {}
    for path, (row, shape) in wanted.items():
        value = np.empty(shape, np.float32)
        for index, name in _names(row, config).items():
            tensor = tensors[name].T if row.transpose else tensors[name]
            if tensor.shape != shape[len(index) :]:
                theirs = tuple(reversed(tensor.shape)) if row.transpose else tensor.shape
                ours = shape[len(index) :][::-1] if row.transpose else shape[len(index) :]
                raise UserError(f"checkpoint: tensor {name} has shape {theirs}, but the model needs {ours}")
            value[index] = tensor
        *parents, leaf = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return params


def _names(row: Row, config: ModelConfig) -> dict[tuple[int, ...], str]:
    """The tensors of a row by their place in our parameter: layer, and expert."""
    sizes = {"layer": config.num_layers, "expert": config.moe.num_experts if config.moe is not None else 0}
    keys = [key for key in sizes if f"{{{key}}}" in row.tensor]
    places = itertools.product(*(range(sizes[key]) for key in keys))
    return {place: row.tensor.format(**dict(zip(keys, place, strict=True))) for place in places}


def _ignorable(name: str, config: ModelConfig) -> bool:
    """A second copy of a tied table, and the rotary frequencies that old checkpoints store."""
    return (name == "lm_head.weight" and config.tie_embeddings) or name.endswith("rotary_emb.inv_freq")


def _some(names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
