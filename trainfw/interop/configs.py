"""Conversion of config.json to `ModelConfig` and back. It imports no arrays: recipes load by it without JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from trainfw.config import INT32, LARGEST, SMALLEST
from trainfw.errors import UserError, expect, one_of, short
from trainfw.interop.families import DEFAULTS, FAMILIES, FAMILY_KEYS, Family
from trainfw.models import FamilyConfig, ModelConfig

_Model = TypeVar("_Model", bound=FamilyConfig)
COUNT = "a whole number of 1 or more, below 2**31"
NUMBER = f"a number from {SMALLEST:g} to {LARGEST:g}"
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_UNSUPPORTED = ("attention_bias", "mlp_bias", "use_bidirectional_attention", "clip_qkv", "mlp_only_layers")
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "sliding"}


def is_count(value: object, least: int = 1) -> bool:
    """Tell whether a value is `COUNT`, or a whole number from `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= INT32


def is_number(value: object, *, signed: bool = False) -> bool:
    """Tell whether a value is `NUMBER`, or the negative of one where it may be `signed`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return SMALLEST <= (abs(value) if signed else value) <= LARGEST


def made(kind: type[_Model], fields: dict[str, object]) -> _Model:
    """Return a model's config of the values of a config.json. Raises UserError where they do not fit one another."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = f"{'.'.join(map(str, first['loc']))} = {short(first['input'])}: "
        raise UserError(f"config.json: {'' if first['type'] == 'combination' else key}{first['msg']}") from None


_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    COUNT: (
        is_count,
        (
            *_REQUIRED,
            *("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "decoder_sparse_step"),
            *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
            "original_max_position_embeddings",
        ),
    ),
    "a whole number of 0 or more, below 2**31": (
        lambda value: is_count(value, 0),
        ("max_window_layers",),
    ),
    NUMBER: (
        is_number,
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
_COMPUTES_NOTHING = {
    # Keys about how a model was made, is loaded and written with, and about what Transformers returns.
    *("architectures", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "use_cache", "cache_implementation"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "experts_implementation"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task", "model_max_length"),
    *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "is_decoder", "is_llama_config", "unsloth_fixed", "unsloth_version"),
    *("transformers.js_config", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups"),
    *("num_return_sequences", "max_length"),
    *("length_penalty", "repetition_penalty", "pretraining_tp", "router_aux_loss_coef", "_sliding_window_pattern"),
}
_COMPUTED = ("num_experts", "experts_per_token", "normalize_weights", "shared_intermediate_size")
"""Fields of a mixture of experts that decide what it computes; others are about how it runs and is trained."""


_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
"""Fields of `ModelConfig` and the keys of config.json with the same values in every family."""


def decoder_config(config: FamilyConfig, path: object) -> ModelConfig:
    """Return the config of the model at `path` as a decoder's. Raises UserError where it is of another family."""
    if isinstance(config, ModelConfig) and config.mup:
        raise UserError(
            f"{path}: is of a model by muP (model.mup), whose factors have no place in other formats; `trainfw export` "
            "folds them into its weights"
        )
    if isinstance(config, ModelConfig):
        return config
    raise UserError(f"{path}: is a model of family {config.family!r}; other formats have names for decoders alone")


def config_from_huggingface(config: Mapping[str, object]) -> ModelConfig:
    """Return the `ModelConfig` of a config.json, in the form of Transformers 5 (`rope_parameters`) or 4.

    Raises UserError for a family or a feature that `Transformer` does not have, and for values that make no sense.
    """
    _check_types(config, "config.json")
    family = _family(config)
    config = {key: value for key, value in config.items() if _counts(key, family)}
    hf = {**DEFAULTS, **family.defaults, **config}
    # A null in the place of a value: only in a few keys it means that something is off.
    off = {"attn_logit_softcapping", "final_logit_softcapping", "rope_theta"}
    off |= set() if family.sliding == "every" else {"sliding_window"}
    for key, default in (DEFAULTS | dict(family.defaults)).items():
        if hf[key] is None and key not in off:
            raise UserError(f"config.json: {key} = null: expected {_EXPECTED[key][0]}, such as {default!r}")
    if hf["model_type"] == "gemma3_text" and hf.get("attn_logit_softcapping"):  # Transformers ignores it
        raise UserError(f"config.json: attn_logit_softcapping = {hf['attn_logit_softcapping']} of a gemma3_text")
    if missing := [key for key in _REQUIRED if hf.get(key) is None]:
        raise UserError(f"config.json: no {', '.join(missing)}")
    if hf["num_hidden_layers"] > 10_000:
        raise UserError(f"config.json: num_hidden_layers = {hf['num_hidden_layers']}: expected 10,000 at most")
    for key in _UNSUPPORTED:
        if hf.get(key):
            raise UserError(f"config.json: {key} = {short(hf[key])} is not supported")
    if isinstance(quantised := hf.get("quantization_config"), dict):
        method = short(quantised["quant_method"]) if "quant_method" in quantised else "an unnamed method"
        raise UserError(f"config.json: weights quantised by {method} are not supported; take the model in bfloat16")
    own, other = sorted(("hidden_act", "hidden_activation"), key=lambda key: key not in family.defaults)
    activation = _agreed({own: hf[own], other: config.get(other)})
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"config.json: activation {short(activation)} is not supported; one of: {known}")
    kinds = _layer_kinds(hf, family)
    # The shortest list that, repeated, gives all of them.
    pattern = kinds[: next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[: len(kinds) - n])]
    fields = {
        **{field: hf[key] for field, key in _FIELDS.items()},
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "activation": _ACTIVATIONS[activation],
        "layer_pattern": pattern,
        "sliding_window": hf["sliding_window"] if "sliding" in pattern else None,
        "attention_softcap": hf.get("attn_logit_softcapping"),
        "final_softcap": hf.get("final_logit_softcapping"),
        **_rope(config, hf, local="sliding" in pattern),
        **family.fields,
    }
    if "moe" in fields:  # dispatched as in Transformers
        if hf.get("decoder_sparse_step", 1) != 1:
            raise UserError(f"config.json: decoder_sparse_step = {hf['decoder_sparse_step']} is not supported")
        # Transformers 5 writes num_local_experts for every family.
        names = ("num_experts", "num_local_experts")
        count = _agreed({key: config.get(key) for key in names}) or next(hf[key] for key in names if hf.get(key))
        experts = {"num_experts": count, "experts_per_token": hf["num_experts_per_tok"], "dispatch": "dropless"}
        fields["moe"] = {**experts, "normalize_weights": bool(hf.get("norm_topk_prob")), **fields["moe"]}
        fields["intermediate_size"] = hf.get("moe_intermediate_size") or hf["intermediate_size"]
    if hf.get("head_dim") is not None:
        fields["head_dim"] = hf["head_dim"]
    if hf.get("query_pre_attn_scalar") is not None:
        fields["query_scale"] = hf["query_pre_attn_scalar"] ** -0.5
    return made(ModelConfig, fields)


def unread_keys(config: Mapping[str, object]) -> list[str]:
    """List the keys of a config.json that are set and not read: unknown keys, and those of other families.

    In our families, Transformers computes nothing by them (attention_dropout and router_jitter_noise count in training
    alone); a model's own code may.
    """
    family = _family(config)
    unread = sorted(
        short(key)[1:-1]
        for key, value in config.items()
        if value and ((key not in _EXPECTED and key not in _COMPUTES_NOTHING) or not _counts(key, family))
    )
    return unread if len(unread) <= 20 else [*unread[:20], f"and {len(unread) - 20} more"]


def _counts(key: str, family: Family) -> bool:
    """Tell whether a key counts in this family: a converted checkpoint may keep the keys of another."""
    return key not in FAMILY_KEYS or key in family.reads


def _agreed(values: Mapping[str, Any]) -> Any:
    """Return the value of keys that mean the same; None where none is set. Raises UserError where two differ."""
    given = {key: value for key, value in values.items() if value is not None}
    first = next(iter(given), "")
    for key, value in given.items():
        if value != given[first]:
            raise UserError(
                f"config.json: {first} = {short(given[first])}, but {key} = {short(value)}: they say the same thing in "
                "two ways; keep the one that is meant"
            )
    return given.get(first)


def _family(config: Mapping[str, Any]) -> Family:
    if (model_type := config.get("model_type")) is None:
        raise UserError(f"config.json: no model_type; one of: {', '.join(FAMILIES)}")
    if model_type == "gemma3":
        raise UserError(
            "config.json: model_type 'gemma3' sees images too, which is not supported; save its language model:\n"
            "  model = transformers.Gemma3ForCausalLM.from_pretrained(DIR, dtype='auto')\n"
            "  model.save_pretrained(NEW_DIR)"
        )
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {short(model_type)} is not supported{one_of(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def _check_types(config: Mapping[str, object], where: str) -> None:
    for key, value in config.items():
        if value is None or key not in _EXPECTED:
            continue
        expected, test = _EXPECTED[key]
        expect(f"{where}: {key}", value, test(value), expected)
        if isinstance(value, dict):
            _check_types(value, f"{where}: {key}")


def _layer_kinds(hf: Mapping[str, Any], family: Family) -> list[str]:
    """Return `global` or `sliding` for each layer. Raises UserError where `layer_types` and the family disagree."""
    listed, layers = hf.get("layer_types"), range(hf["num_hidden_layers"])
    for name in listed or ():
        if not isinstance(name, str) or name not in _LAYER_TYPES:
            known = ", ".join(_LAYER_TYPES)
            raise UserError(f"config.json: layer_types: {short(name)} is not supported; one of: {known}")
    if listed is not None and len(listed) != len(layers):
        raise UserError(f"config.json: layer_types has {len(listed)} entries for {len(layers)} layers")
    listed = listed and [_LAYER_TYPES[name] for name in listed]
    unused = "use_sliding_window" in family.defaults and not hf["use_sliding_window"]
    if family.sliding == "never" or hf.get("sliding_window") is None or unused:
        kinds = ["global"] * len(layers)
    elif family.sliding == "always":
        kinds = ["sliding"] * len(layers)
    elif listed is not None:
        kinds = listed
    elif family.sliding == "every":
        kinds = ["sliding" if (i + 1) % hf["sliding_window_pattern"] else "global" for i in layers]
    else:
        kinds = ["sliding" if i >= hf["max_window_layers"] else "global" for i in layers]
    if listed not in (None, kinds):
        given = [f"{key} = {hf[key]}" for key in ("sliding_window", "use_sliding_window") if key in hf]
        windows = ", ".join(given) or "no sliding_window"
        raise UserError(
            f"config.json: layer_types has {listed.count('sliding')} sliding layers of {len(listed)}, but "
            f"{hf['model_type']} with {windows} has {kinds.count('sliding')}"
        )
    return kinds


def _rope(config: Mapping[str, Any], hf: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """Return the rotary fields.

    `rope_parameters` (Transformers 5), `rope_scaling` and the keys beside them (4) may all be there, if they agree.

    Args:
        local: flag: there are sliding layers, which may have a base of their own.
    """
    whole, sliding = _rope_dicts(config)

    def value_of(key: str, dicts: Mapping[str, Any] = whole, beside: str | None = None) -> Any:
        at_top = {beside: config.get(beside)} if beside is not None else {}
        return _agreed(at_top | {f"{name}.{key}": rope.get(key) for name, rope in dicts.items()})

    kind, local_kind = (
        _agreed({f"{name}.rope_type": _rope_type(name, rope) for name, rope in dicts.items() if rope}) or "default"
        for dicts in (whole, sliding)
    )
    if kind not in ("default", "linear", "llama3") or local_kind != "default":
        odd = short(local_kind if kind in ("default", "linear", "llama3") else kind)
        raise UserError(f"config.json: rope_scaling of type {odd} is not supported; one of: linear, llama3")
    parameters, scaling = whole.get("rope_parameters", {}), whole["rope_scaling"]
    for key in ("rope_theta", *_SCALING) if scaling else ():
        # Transformers ignores all `rope_parameters` where there is a `rope_scaling`.
        if parameters.get(key) is not None and scaling.get(key) is None and config.get(key) is None:
            raise UserError(
                f"config.json: rope_parameters.{key} = {parameters[key]!r}, but rope_scaling, which counts in its "
                "place, has none; keep one of the two"
            )
    for name, rope in (whole | sliding).items():
        for key, value in rope.items():
            if value and key not in _EXPECTED:
                raise UserError(f"config.json: {name}.{short(key)[1:-1]} = {short(value)} is not supported")
    if (value_of("partial_rotary_factor", whole | sliding, "partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported")
    fields: dict[str, Any] = {"rope_theta": value_of("rope_theta", beside="rope_theta") or hf["rope_theta"]}
    if fields["rope_theta"] is None:
        raise UserError(f"config.json: rope_theta = null: expected {_EXPECTED['rope_theta'][0]}")
    local_theta = value_of("rope_theta", sliding, "rope_local_base_freq") or hf.get("rope_local_base_freq")
    if local and local_theta is not None:
        fields["rope_local_theta"] = local_theta
    keys = {"linear": ("factor",), "llama3": tuple(_SCALING)}.get(kind, ())
    original = "original_max_position_embeddings"
    values = {key: value_of(key, beside=original if key == original else None) for key in keys}
    if missing := [key for key, value in values.items() if value is None]:
        raise UserError(f"config.json: rope_scaling of type {kind!r} has no {', '.join(missing)}")
    if keys:
        fields["rope_scaling"] = {"kind": kind, **{_SCALING[key]: value for key, value in values.items()}}
    return fields


def _rope_dicts(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rotary settings of all layers (or the global ones), and of the sliding ones, by where they stand."""
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    parted, two = bool(parameters.keys() & _LAYER_TYPES.keys()), config.get("model_type") == "gemma3_text"
    if parameters and parted != two:
        expected = f"{' and '.join(_LAYER_TYPES)} within it" if two else "one for all layers"
        raise UserError(f"config.json: rope_parameters: expected {expected}, as {config.get('model_type')} has them")
    if not parted:
        return {"rope_parameters": parameters, "rope_scaling": scaling}, {}
    if extra := [key for key, value in parameters.items() if value and key not in _LAYER_TYPES]:
        raise UserError(f"config.json: rope_parameters.{extra[0]} is beside {' and '.join(_LAYER_TYPES)}, not in them")
    whole, sliding = ({f"rope_parameters.{name}": parameters.get(name) or {}} for name in _LAYER_TYPES)
    return whole | {"rope_scaling": scaling}, sliding


def _rope_type(name: str, rope: Mapping[str, Any]) -> str:
    return _agreed({f"{name}.rope_type": rope.get("rope_type"), f"{name}.type": rope.get("type")}) or "default"


_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position",
}
"""Keys of config.json's rotary scaling, and the fields of `RopeScaling`."""


def config_to_huggingface(config: ModelConfig, *, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a config.json that is read back as the same model, for Transformers 5 and 4.4x.

    Args:
        extra: further keys (`bos_token_id`, ...). With `model_type`, the config.json that the model came with: all of
            it is kept if it still describes the model, else all but the keys that describe a model.

    Raises UserError, with the fields that differ, where no family has such a model.
    """
    extra = dict(extra or {})
    if extra.get("model_type") in FAMILIES and not _differences(config, extra):
        return extra
    other_keys = {key: value for key, value in extra.items() if key not in _DESCRIBES}
    families = sorted(FAMILIES, key=lambda name: name != extra.get("model_type"))
    all_differences: dict[str, list[str]] = {}
    for name in families:
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        written = {**tokens, **other_keys, **_written(config, name)}
        if not (differences := _differences(config, written)):
            return written
        all_differences[name] = differences
    nearest = min(families, key=lambda name: len(all_differences[name]))
    different = "; ".join(all_differences[nearest])
    raise UserError(
        f"no Hugging Face family has a model like this; the nearest, {nearest}, would differ in {different}"
    )


_DESCRIBES = {
    *_EXPECTED,
    *("architectures", "transformers_version"),
    *(key for family in FAMILIES.values() for key in family.writes),
} - {"dtype", "torch_dtype"}


def _differences(config: ModelConfig, written: Mapping[str, object]) -> list[str]:
    try:
        actual = _essence(config_from_huggingface(written))
    except UserError as error:
        return [str(error)]
    return [f"{key}: {actual[key]!r} for {value!r}" for key, value in _essence(config).items() if actual[key] != value]


def _essence(config: ModelConfig) -> dict[str, object]:
    """Return the fields that decide what a model computes, each in one spelling."""
    fields = config.model_dump(exclude={"preset", "from_", "layer_pattern", "moe"})
    slides = "sliding" in config.layer_kinds
    return {
        **fields,
        "layer_kinds": config.layer_kinds,
        "sliding_window": config.sliding_window if slides else None,
        "query_scale": config.head_dim**-0.5 if config.query_scale is None else config.query_scale,
        **{f"moe.{key}": None if config.moe is None else getattr(config.moe, key) for key in _COMPUTED},
    }


def _written(config: ModelConfig, model_type: str) -> dict[str, object]:
    """Return the model's config.json in this family, which may not have such a model."""
    family = FAMILIES[model_type]
    gemma = family.sliding == "every"
    activation = next(key for key, value in _ACTIVATIONS.items() if value == config.activation)
    written = {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation" if gemma else "hidden_act": activation,
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


def _sliding_written(config: ModelConfig, family: Family) -> dict[str, object]:
    kinds, slides = config.layer_kinds, "sliding" in config.layer_kinds
    names = {kind: name for name, kind in _LAYER_TYPES.items()}
    written: dict[str, Any] = {}
    if family.sliding != "never":
        written["sliding_window"] = config.sliding_window if slides else None
    if "use_sliding_window" in family.defaults:
        written["use_sliding_window"] = slides
    if family.sliding in ("from", "every"):
        written["layer_types"] = [names[kind] for kind in kinds]
    if family.sliding == "from":
        written["max_window_layers"] = kinds.index("sliding") if slides else len(kinds)
    if family.sliding == "every":
        written["sliding_window"] = config.sliding_window or 4096  # Transformers requires a number
    if "sliding_window_pattern" in family.reads:  # Transformers 4 knows no layer_types
        written["sliding_window_pattern"] = kinds.index("global") + 1 if "global" in kinds else len(kinds) + 1
    return written


def _rope_written(config: ModelConfig, *, nested: bool) -> dict[str, object]:
    """Return `rope_parameters` as in Transformers 5, and the same in the keys of Transformers 4.

    Args:
        nested: flag: sliding layers have a base of their own, as in Gemma 3.
    """
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        fields = config.rope_scaling.model_dump(exclude_none=True)
        scaling = {"rope_type": fields["kind"], **{k: fields[own] for k, own in _SCALING.items() if own in fields}}
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    written = {"rope_parameters": rope, "rope_theta": config.rope_theta, "rope_scaling": scaling}
    if nested:
        local = 1e4 if config.rope_local_theta is None else config.rope_local_theta
        sliding = {"rope_theta": local, "rope_type": "default"}
        written["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding}
        written["rope_local_base_freq"] = local
    return written
