"""config.json to `ModelConfig` and back. Reads no arrays and imports none: recipes load by it without JAX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from trainfw.errors import UserError, did_you_mean
from trainfw.interop.families import DEFAULTS, FAMILIES, Family
from trainfw.models import ModelConfig

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_UNSUPPORTED = ("attention_bias", "mlp_bias", "use_bidirectional_attention", "clip_qkv", "mlp_only_layers")
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "sliding"}


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a whole number of 1 or more": (
        lambda value: _integer(value) and 1 <= value < 2**31,
        (
            *_REQUIRED,
            *("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "decoder_sparse_step"),
            *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
            "original_max_position_embeddings",
        ),
    ),
    "a whole number of 0 or more": (lambda value: _integer(value) and 0 <= value < 2**31, ("max_window_layers",)),
    "a positive number": (
        lambda value: (_integer(value) or isinstance(value, float)) and 0 < value < math.inf,
        (
            *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range", "query_pre_attn_scalar"),
            *("attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor", "clip_qkv"),
            *("factor", "low_freq_factor", "high_freq_factor"),
        ),
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        (
            *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"),
            "use_bidirectional_attention",
        ),
    ),
    "text": (
        lambda value: isinstance(value, str),
        ("model_type", "hidden_act", "hidden_activation", "rope_type", "type", "dtype", "torch_dtype"),
    ),
    "an object": (
        lambda value: isinstance(value, dict),
        ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention"),
    ),
    "a list": (lambda value: isinstance(value, list), ("layer_types", "mlp_only_layers")),
}
_EXPECTED = {key: (expected, test) for expected, (test, keys) in _KINDS.items() for key in keys}
# What says how a model runs or was trained, and not what it computes.
_RUNNING = ("dispatch", "capacity_factor", "balance_loss", "z_loss")


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json, in the form of Transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).

    Raises UserError for a family or a feature that `Transformer` does not have, and for values that make no sense.
    """
    _check_types(config, "config.json")
    hf = {**_family_defaults(config), **{key: value for key, value in config.items() if not _absent(key, value)}}
    if missing := [key for key in _REQUIRED if hf.get(key) is None]:
        raise UserError(f"config.json: no {', '.join(missing)}")
    if hf["num_hidden_layers"] > 10_000:
        raise UserError(f"config.json: num_hidden_layers = {hf['num_hidden_layers']}: expected 10,000 at most")
    for key in _UNSUPPORTED:
        if hf.get(key):
            raise UserError(f"config.json: {key} = {hf[key]} is not supported")
    if isinstance(quantised := hf.get("quantization_config"), dict):
        method = str(quantised.get("quant_method", "an unnamed method"))[:40]
        raise UserError(f"config.json: weights quantised by {method} are not supported; take the model in bfloat16")
    activation = hf.get("hidden_activation") or hf["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json: activation {activation!r} is not supported; one of: {', '.join(_ACTIVATIONS)}")
    family = FAMILIES[hf["model_type"]]
    pattern = _period(_layer_kinds(hf, family))
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
        **family.fields,
    }
    if "moe" in fields:
        fields |= _experts(config, hf, fields["moe"])
    if hf.get("head_dim") is not None:
        fields["head_dim"] = hf["head_dim"]
    if hf.get("query_pre_attn_scalar") is not None:
        fields["query_scale"] = hf["query_pre_attn_scalar"] ** -0.5
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"config.json: {first['msg']}") from None


def _family_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError for a family that is none of ours."""
    model_type = config.get("model_type") or ""
    if model_type == "gemma3":
        raise UserError(
            "config.json: model_type 'gemma3' sees images too, which is not supported; save its language model:\n"
            "  model = transformers.Gemma3ForCausalLM.from_pretrained(DIR, dtype='auto')\n"
            "  model.save_pretrained(NEW_DIR)"
        )
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not supported{did_you_mean(model_type, FAMILIES)}")
    return {**DEFAULTS, **FAMILIES[model_type].defaults}


def _absent(key: str, value: Any) -> bool:
    return value is None and key in DEFAULTS


def _check_types(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        if value is None or key not in _EXPECTED:
            continue
        expected, test = _EXPECTED[key]
        if not test(value):
            raise UserError(f"{where}: {key} = {str(value)[:80]!r}: expected {expected}")
        if isinstance(value, dict):
            _check_types(value, f"{where}: {key}")


def _experts(config: Mapping[str, Any], hf: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts, whose dispatch is that of Transformers: nothing is dropped."""
    if hf.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"config.json: decoder_sparse_step = {hf['decoder_sparse_step']} is not supported")
    # Transformers 5 writes num_local_experts for every family.
    counts = [source[key] for source in (config, hf) for key in ("num_experts", "num_local_experts") if source.get(key)]
    experts = {
        "num_experts": counts[0],
        "experts_per_token": hf["num_experts_per_tok"],
        "normalize_weights": bool(hf.get("norm_topk_prob")),
        "dispatch": "dropless",
    }
    return {
        "intermediate_size": hf.get("moe_intermediate_size") or hf["intermediate_size"],
        "moe": {**experts, **moe},
    }


def _layer_kinds(hf: Mapping[str, Any], family: Family) -> list[str]:
    """`global` or `sliding` for each layer."""
    layers = range(hf["num_hidden_layers"])
    if family.sliding == "never" or hf.get("sliding_window") is None or hf.get("use_sliding_window") is False:
        return ["global" for _ in layers]
    if family.sliding == "always":
        return ["sliding" for _ in layers]
    if hf.get("layer_types") is not None:
        if unknown := {str(name) for name in hf["layer_types"]} - set(_LAYER_TYPES):
            raise UserError(f"config.json: layer_types: {', '.join(sorted(unknown))} is not supported")
        if len(hf["layer_types"]) != len(layers):
            raise UserError(f"config.json: layer_types has {len(hf['layer_types'])} entries for {len(layers)} layers")
        return [_LAYER_TYPES[name] for name in hf["layer_types"]]
    if family.sliding == "every":
        return ["sliding" if (i + 1) % hf["sliding_window_pattern"] else "global" for i in layers]
    return ["sliding" if i >= hf["max_window_layers"] else "global" for i in layers]


def _period(kinds: Sequence[str]) -> list[str]:
    """The shortest list that, repeated, gives `kinds`."""
    lengths = range(1, len(kinds) + 1)
    length = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return list(kinds[:length])


def _rope(hf: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """The rotary fields; `local` says whether there are sliding layers to have a base of their own."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local_rope = {"rope_theta": hf.get("rope_local_base_freq")}
    if rope.get("full_attention") is not None:
        local_rope, rope = {**local_rope, **(rope.get("sliding_attention") or {})}, rope["full_attention"]
    fields: dict[str, Any] = {"rope_theta": rope.get("rope_theta") or hf["rope_theta"]}
    if local and local_rope["rope_theta"] is not None:
        fields["rope_local_theta"] = local_rope["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if (local_rope.get("rope_type") or "default") != "default" or kind not in ("default", "linear", "llama3"):
        raise UserError(f"config.json: rope_scaling of type {kind!r} is not supported; one of: linear, llama3")
    if (rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported")
    keys = {"linear": ("factor",), "llama3": tuple(_SCALING)}.get(kind, ())
    if missing := [key for key in keys if rope.get(key) is None]:
        raise UserError(f"config.json: rope_scaling of type {kind!r} has no {', '.join(missing)}")
    if keys:
        fields["rope_scaling"] = {"kind": kind, **{_SCALING[key]: rope[key] for key in keys}}
    return fields


# Theirs and ours.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position",
}


def config_to_huggingface(config: ModelConfig, *, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model, such that reading it back gives the same model; Transformers 5 and 4.4x read it.

    Args:
        extra: further keys (`bos_token_id`, ...). With `model_type`, the config.json that the model came with: it is
            kept as it is where it still describes the model, else all but the keys that describe it.

    Raises UserError that names the fields which no family can say.
    """
    extra = dict(extra or {})
    if extra.get("model_type") in FAMILIES and not _differences(config, extra):
        return extra
    kept = {key: value for key, value in extra.items() if key not in _DESCRIBES}
    families = sorted(FAMILIES, key=lambda name: name != extra.get("model_type"))
    best: tuple[str, list[str]] | None = None
    for name in families:
        written = {**_TOKENS, **kept, **_written(config, name)}
        differences = _differences(config, written)
        if not differences:
            return written
        if best is None or len(differences) < len(best[1]):
            best = name, differences
    assert best is not None
    raise UserError(
        f"no Hugging Face family has a model like this; the nearest, {best[0]}, would differ in {'; '.join(best[1])}"
    )


_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_DESCRIBES = {
    *_EXPECTED,
    *("architectures", "transformers_version"),
    *(key for family in FAMILIES.values() for key in family.writes),
} - {"dtype", "torch_dtype"}


def _differences(config: ModelConfig, written: Mapping[str, Any]) -> list[str]:
    """How the model of a config.json differs from this one, field by field."""
    try:
        found = config_from_huggingface(written)
    except UserError as error:
        return [str(error)]
    ours, theirs = _essence(config), _essence(found)
    return [f"{key}: {theirs[key]!r} for {value!r}" for key, value in ours.items() if theirs[key] != value]


def _essence(config: ModelConfig) -> dict[str, Any]:
    """What the model computes, in one way of saying it."""
    fields = config.model_dump(exclude={"preset", "from_", "layer_pattern", "moe"})
    slides = "sliding" in config.layer_kinds
    moe = config.moe.model_dump(exclude=set(_RUNNING)) if config.moe is not None else {}
    return {
        **fields,
        "layer_kinds": config.layer_kinds,
        "sliding_window": config.sliding_window if slides else None,
        "query_scale": config.head_dim**-0.5 if config.query_scale is None else config.query_scale,
        **{f"moe.{key}": moe.get(key) for key in ("num_experts", "experts_per_token", "normalize_weights")},
        "moe.shared_intermediate_size": moe.get("shared_intermediate_size"),
    }


def _written(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """config.json of this family; it may not describe the model."""
    family = FAMILIES[model_type]
    gemma = family.sliding == "every"
    activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation]
    written = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation" if gemma else "hidden_act": activation,
        "max_position_embeddings": config.max_position,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **family.writes,
        **_sliding_written(config, family),
        **_rope_written(config, nested=model_type == "gemma3_text"),
    }
    if gemma:
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        written |= {
            "query_pre_attn_scalar": round(scale**-2) or 1,  # a whole number in Transformers' config classes
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    if config.moe is not None and "moe" in family.fields:
        written["num_local_experts" if model_type == "mixtral" else "num_experts"] = config.moe.num_experts
        written["num_experts_per_tok"] = config.moe.experts_per_token
        if model_type != "mixtral":
            written["norm_topk_prob"] = config.moe.normalize_weights
        if "moe_intermediate_size" in family.defaults:
            written["moe_intermediate_size"] = config.intermediate_size
    return written


def _sliding_written(config: ModelConfig, family: Family) -> dict[str, Any]:
    kinds, slides = config.layer_kinds, "sliding" in config.layer_kinds
    names = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
    written: dict[str, Any] = {}
    if family.sliding != "never":
        written["sliding_window"] = config.sliding_window if slides else None
    if "use_sliding_window" in family.defaults:
        written["use_sliding_window"] = slides
    if family.sliding in ("from", "every"):
        written["layer_types"] = [names[kind] for kind in kinds]
    first = kinds.index("sliding") if slides else len(kinds)
    if family.sliding == "from":
        written["max_window_layers"] = first
    if family.sliding == "every":
        # Transformers 4 knows no layer_types, and no layers without a window.
        written["sliding_window_pattern"] = kinds.index("global") + 1 if "global" in kinds else len(kinds) + 1
        written["sliding_window"] = config.sliding_window or 4096
    return written


def _rope_written(config: ModelConfig, *, nested: bool) -> dict[str, Any]:
    """`rope_parameters` as Transformers 5 has them, and the same in the keys of Transformers 4.

    nested: sliding layers have a base of their own, as in Gemma 3.
    """
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        ours = config.rope_scaling.model_dump(exclude_none=True)
        scaling = {"rope_type": ours["kind"], **{theirs: ours[key] for theirs, key in _SCALING.items() if key in ours}}
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    written = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if not nested:
        return {"rope_parameters": rope, **written}
    local = 1e4 if config.rope_local_theta is None else config.rope_local_theta
    sliding = {"rope_theta": local, "rope_type": "default"}
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": sliding},
        "rope_local_base_freq": local,
        **written,
    }
