"""Conversion of a diffusers autoencoder's config.json to `AutoencoderConfig` and back. It imports no arrays.

https://github.com/huggingface/diffusers: models/autoencoders/autoencoder_kl.py has the keys and their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainfw.config import LARGEST
from trainfw.errors import UserError, expect, short
from trainfw.interop.configs import COUNT, NUMBER, is_count, is_number, made
from trainfw.interop.paths import AUTOENCODER
from trainfw.models import AutoencoderConfig

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

_FIELDS = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_groups",
    "mid_block_add_attention": "mid_attention",
    "use_quant_conv": "quant_conv",
    "use_post_quant_conv": "post_quant_conv",
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
}
"""Keys of config.json, and fields of `AutoencoderConfig` with the same values."""
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "down_block_types": [_DOWN],
    "up_block_types": [_UP],
}
"""Values of keys that a config.json leaves out: those of diffusers."""
_COMPUTES_NOTHING = {"_class_name", "_diffusers_version", "_name_or_path", "force_upcast"}
"""Keys about how a model was made, and about the dtype in which a pipeline runs it."""


_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    COUNT: (
        is_count,
        ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "sample_size"),
    ),
    "a list of whole numbers": (
        lambda value: isinstance(value, list) and all(map(is_count, value)) and 1 <= len(value) <= 12,
        ("block_out_channels",),
    ),
    NUMBER: (is_number, ("scaling_factor",)),
    f"null, or a number up to {LARGEST:g}": (
        lambda value: value is None or value == 0 or is_number(value, signed=True),
        ("shift_factor",),
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"),
    ),
}


def autoencoder_from_diffusers(config: Mapping[str, object]) -> AutoencoderConfig:
    """Return the `AutoencoderConfig` of a config.json.

    Raises UserError for another class, for a key or value that `Autoencoder` does not have, and for values that make no
    sense.
    """
    name = config.get("_class_name")
    expect("config.json: _class_name", name, name == AUTOENCODER, repr(AUTOENCODER))
    for key, value in config.items():
        if key not in _DEFAULTS and key not in _COMPUTES_NOTHING and value is not None:
            raise UserError(f"config.json: {short(key)[1:-1]} = {short(value)} is not supported")
    values = _DEFAULTS | {key: value for key, value in config.items() if key in _DEFAULTS}
    for expected, (test, keys) in _KINDS.items():
        for key in keys:
            expect(f"config.json: {key}", values[key], test(values[key]), expected)
    blocks = values["block_out_channels"]
    types = {"down_block_types": [_DOWN] * len(blocks), "up_block_types": [_UP] * len(blocks)}
    for key, needed in {"act_fn": "silu", "out_channels": values["in_channels"], **types}.items():
        if values[key] != needed:
            raise UserError(f"config.json: {key} = {short(values[key])} is not supported; expected {short(needed)}")
    reduction = 2 ** (len(blocks) - 1)
    fields = {field: values[key] for key, field in _FIELDS.items()}
    # It bounds the tiles of diffusers' tiled decoding, no more: ours is to be halved between blocks.
    fields["image_size"] = -(-values["sample_size"] // reduction) * reduction
    fields |= {"shift_factor": float(values["shift_factor"] or 0.0), "scaling_factor": float(values["scaling_factor"])}
    return made(AutoencoderConfig, {"family": "autoencoder", **fields})


def autoencoder_to_diffusers(config: AutoencoderConfig) -> dict[str, object]:
    blocks = list(config.block_channels)
    return {
        "_class_name": AUTOENCODER,
        **{key: getattr(config, field) for key, field in _FIELDS.items()},
        "block_out_channels": blocks,
        "out_channels": config.channels,
        "shift_factor": config.shift_factor or None,
        "act_fn": "silu",
        "down_block_types": [_DOWN] * len(blocks),
        "up_block_types": [_UP] * len(blocks),
    }
