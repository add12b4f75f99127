"""Conversion of a diffusers transformer's config.json to `DiTConfig` and back. It imports no arrays.

https://github.com/huggingface/diffusers: models/transformers/ has the keys and their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainfw.errors import UserError, expect, short
from trainfw.interop.configs import COUNT, NUMBER, is_count, is_number, made
from trainfw.models import DiTConfig

DIT, PIXART, SD3 = "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"
CLASSES = {"class": DIT, "cross": PIXART, "joint": SD3}
"""diffusers' class of a model, by its conditioning."""
_OLDER, _OLDER_KINDS = "Transformer2DModel", {"ada_norm_zero": DIT, "ada_norm_single": PIXART}
"""Class that published DiT and PixArt directories name, which diffusers reads as those of today by `norm_type`."""
_EPS = 1e-6
_FIELDS = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "out_channels": "out_channels",
    "patch_size": "patch_size",
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
}
"""Keys of config.json, and fields of `DiTConfig` with the same values."""
_OWN_FIELDS = {
    DIT: {"num_embeds_ada_norm": "num_classes", "norm_eps": "mlp_norm_eps"},
    PIXART: {"caption_channels": "caption_size", "norm_eps": "norm_eps", "interpolation_scale": "position_scale"},
    SD3: {
        "joint_attention_dim": "caption_size",
        "pooled_projection_dim": "pooled_size",
        "pos_embed_max_size": "largest_grid",
    },
}
_BLOCKS: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "upcast_attention": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "attention_type": "default",
    "use_linear_projection": False,
    "num_vector_embeds": None,
}
_XL = {"in_channels": 4, "patch_size": 2, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
_DEFAULTS: dict[str, dict[str, Any]] = {
    DIT: {
        **_XL,
        "sample_size": 32,
        "out_channels": None,
        "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-5,
        **_BLOCKS,
        "norm_type": "ada_norm_zero",
        "cross_attention_dim": None,
        "caption_channels": None,
    },
    PIXART: {
        **_XL,
        "sample_size": 128,
        "out_channels": 8,
        "norm_eps": 1e-6,
        "caption_channels": None,
        "cross_attention_dim": 1152,
        "interpolation_scale": None,
        "use_additional_conditions": None,
        **_BLOCKS,
        "norm_type": "ada_norm_single",
    },
    SD3: {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 18,
        "num_attention_heads": 18,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
}
"""Values of the keys that a config.json leaves out: those of diffusers. Other keys are unknown."""
_COMPUTES_NOTHING = {"norm_num_groups", "num_embeds_ada_norm"}
_CAPTION_LENGTHS = {PIXART: 120, SD3: 333}
"""Tokens of the captions that the published models were trained on: no config.json says, and no weight depends on."""


_NUMBERS = ("norm_eps", "interpolation_scale")
_MAY_BE_NULL = ("out_channels", "interpolation_scale", "pos_embed_max_size")


def transformer_from_diffusers(config: Mapping[str, object]) -> DiTConfig:
    """Return the `DiTConfig` of a config.json.

    Raises UserError for another class, for a key or value that `DiT` does not have, and for values that make no sense.
    """
    kind = _class(config)
    defaults = _DEFAULTS[kind]
    for key, value in config.items():
        nothing = key.startswith("_") or (key in _COMPUTES_NOTHING and key not in _OWN_FIELDS[kind])
        if key not in defaults and not nothing and value is not None:
            raise UserError(f"config.json: {short(key)[1:-1]} = {short(value)} is not supported")
    values = defaults | {key: value for key, value in config.items() if key in defaults}
    names = _FIELDS | _OWN_FIELDS[kind]
    for key in names:
        test, expected = (is_number, NUMBER) if key in _NUMBERS else (is_count, COUNT)
        fits = test(values[key]) or (values[key] is None and key in _MAY_BE_NULL)
        expect(f"config.json: {key}", values[key], fits, expected)
    width = values["num_attention_heads"] * values["attention_head_dim"]
    for key, needed in _needed(kind, values, width).items():
        if values[key] != needed or isinstance(values[key], bool) != isinstance(needed, bool):
            raise UserError(f"config.json: {key} = {short(values[key])} is not supported; expected {short(needed)}")
    fields = {field: values[key] for key, field in names.items()}
    fields["out_channels"] = values["out_channels"] or values["in_channels"]
    fields["hidden_size"] = width
    if kind == PIXART:
        fields["position_scale"] = float(values["interpolation_scale"] or max(values["sample_size"] // 64, 1))
    if kind == SD3:
        fields["qk_norm"] = values["qk_norm"] is not None
    if kind in _CAPTION_LENGTHS:
        fields["caption_length"] = _CAPTION_LENGTHS[kind]
    fields |= {key: float(fields[key]) for key in ("norm_eps", "mlp_norm_eps") if key in fields}
    return made(DiTConfig, {"conditioning": {name: key for key, name in CLASSES.items()}[kind], **fields})


def _class(config: Mapping[str, object]) -> str:
    name = config.get("_class_name")
    if name == _OLDER:
        norm = config.get("norm_type")
        if not isinstance(norm, str) or norm not in _OLDER_KINDS:
            known = ", ".join(_OLDER_KINDS)
            raise UserError(f"config.json: norm_type = {short(norm)} of a {_OLDER}: expected one of {known}")
        return _OLDER_KINDS[norm]
    expect("config.json: _class_name", name, name in CLASSES.values(), f"one of {', '.join(CLASSES.values())}")
    return str(name)


def _needed(kind: str, values: Mapping[str, object], width: int) -> dict[str, object]:
    """Return the keys that have one value only, in a class, and that value."""
    if kind == SD3:
        norms: dict[str, object] = {} if values["qk_norm"] == "rms_norm" else {"qk_norm": None}
        return {"caption_projection_dim": width, "dual_attention_layers": [], **norms}
    needed = _BLOCKS | {"norm_type": _DEFAULTS[kind]["norm_type"]}
    if kind == DIT:
        return needed | {"cross_attention_dim": None, "caption_channels": None}
    # Null is true of 128 latents: resolutions and aspect ratios are conditions too.
    plain = False if values["sample_size"] == 128 or values["use_additional_conditions"] is not None else None
    return needed | {"cross_attention_dim": width, "use_additional_conditions": plain}


def transformer_to_diffusers(config: DiTConfig) -> dict[str, object]:
    """Return the config.json of a diffusion transformer. Raises UserError where diffusers has no such model."""
    kind = CLASSES.get(config.conditioning)
    if kind is None:
        raise UserError(f"model.conditioning = {config.conditioning}: diffusers has no transformer of that")
    needed: dict[str, object] = {
        "hidden_size": config.num_heads * config.head_dim,
        "intermediate_size": 4 * config.hidden_size,
        "positions": "sincos",
        "norm_eps": config.norm_eps if kind == PIXART else _EPS,
        "mlp_norm_eps": {DIT: config.mlp_norm_eps, PIXART: config.norm_eps, SD3: _EPS}[kind],
        "qk_norm": config.qk_norm if kind == SD3 else False,
        "position_scale": config.position_scale if kind == PIXART else 1.0,
        "largest_grid": config.largest_grid if kind == SD3 else None,
    }
    for field, value in needed.items():
        if (own := getattr(config, field)) != value:
            raise UserError(f"model.{field} = {own}: diffusers' {kind} has {value}, and no other")
    written: dict[str, object] = {"_class_name": kind}
    written |= {key: getattr(config, field) for key, field in (_FIELDS | _OWN_FIELDS[kind]).items()}
    if kind == SD3:
        width = {"caption_projection_dim": config.hidden_size}
        return written | width | {"dual_attention_layers": [], "qk_norm": "rms_norm" if config.qk_norm else None}
    keys = ("attention_bias", "activation_fn", "norm_elementwise_affine", "norm_type")
    written |= {key: _DEFAULTS[kind][key] for key in keys}
    if kind == PIXART:
        written |= {"cross_attention_dim": config.hidden_size, "use_additional_conditions": False}
    return written
