"""Adapters of diffusion transformers in the form that diffusers' loaders read: pytorch_lora_weights.safetensors.

Its tensors are named as PEFT does, after `transformer.`, and its header has the keys of PEFT's LoraConfig.
https://github.com/huggingface/diffusers: loaders/peft.py reads it, loaders/lora_base.py writes it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainfw.adapters import AdapterConfig, config_targets
from trainfw.errors import UserError
from trainfw.formats import SafetensorsTensors
from trainfw.interop.diffusers.names import NAMES
from trainfw.interop.diffusers.transformer_config import CLASSES
from trainfw.interop.peft_config import PeftConfig, peft_config
from trainfw.interop.peft_tensors import Places, StoredAdapter, named_tensors, written_config
from trainfw.interop.saving import new_directory
from trainfw.json_text import json_object
from trainfw.models import DiTConfig

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"
_NOT_IN_LAST = ("last.caption_attention.output", "last.caption_mlp.up", "last.caption_mlp.down")


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Tell whether a directory holds an adapter in diffusers' form."""
    return os.path.lexists(Path(path) / LORA_WEIGHTS)


def read_lora(path: str | os.PathLike[str], model: DiTConfig) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """Read an adapter of a model of this shape: its config, and its arrays by our names, in the dtype of the file.

    Raises UserError where the directory holds no LoRA, rsLoRA or DoRA of the transformer alone, or tensors that do not
    fit the model.
    """
    places = _places(model)
    return _open_lora(path, places).read(places)


def lora_fields(path: str | os.PathLike[str], model: DiTConfig) -> dict[str, object]:
    """Return the fields of `AdapterConfig` of an adapter of a model, without reading its values."""
    places = _places(model)
    stored = _open_lora(path, places)
    own = {module: name for name, by_layer in places.items() for module in by_layer.values()}
    if extra := stored.modules - set(own):
        raise stored.no_place(min(map(stored.tensor_of, extra)))
    return stored.fields(own.__getitem__)


def save_lora(
    directory: str | os.PathLike[str], config: AdapterConfig, arrays: Mapping[str, np.ndarray], model: DiTConfig
) -> None:
    """Write an adapter of a transformer as a pipeline of diffusers would.

    Raises UserError where diffusers has no such model, or no adapter of one of its weights, or the directory exists.
    """
    from safetensors.numpy import save

    sizes, places = config_targets(config, model), _places(model)
    if others := set(sizes) - set(places):
        raise UserError(f"{min(others)}: diffusers has no adapter of it; merge it into the model instead")
    written = written_config(config, sizes, {name: places[name].values() for name in sizes})
    tensors = named_tensors(arrays, places, _PREFIX)
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(f"tensor {name} has values that are not finite: nothing is written")
    keys = json.dumps({_PREFIX + key: value for key, value in written.items()}, indent=2, sort_keys=True)
    with new_directory(directory) as temporary:
        # `save_file` would write files that no other user may read, whatever the umask.
        (temporary / LORA_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt", _METADATA: keys}))


def _places(model: DiTConfig) -> Places:
    """Return the modules of our linear maps; those that diffusers keeps copies of, or as convolutions, are left out."""
    kind = CLASSES.get(model.conditioning)
    if kind is None:
        raise UserError(f"model.conditioning = {model.conditioning}: diffusers has no transformer of that")
    places: dict[str, dict[tuple[int, ...], str]] = {}
    for row in NAMES[kind]:
        name, module = row.path.removesuffix(".kernel"), row.tensor.removesuffix(".weight")
        stacked = row.path.startswith("layers.")
        if row.form != "transposed" or name in _NOT_IN_LAST or ("{layer}" in module and not stacked):
            continue
        layers = range(len(model.layer_kinds))
        if stacked:
            places[name] = {(layer,): module.format(layer=layer) for layer in layers}
        else:
            places[name] = {(): module.format(last=model.num_layers - 1)}
    return places


def _open_lora(path: str | os.PathLike[str], places: Places) -> StoredAdapter:
    file = Path(path) / LORA_WEIGHTS
    tensors = SafetensorsTensors(path, LORA_WEIGHTS)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors.infos) else ""
    for name in tensors.infos:
        if not name.startswith(prefix):
            raise UserError(f"{file}: tensor {name[:200]} is of another model than the transformer")
    keys = tensors.metadata.get(_METADATA)
    if keys is None:
        config = _as_without_metadata(file, tensors, prefix)
    else:
        given = json_object(keys.encode(), file)
        given = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        config = peft_config(given, file)
    more = [module for by_layer in places.values() for module in by_layer.values()]
    return StoredAdapter(file, config, tensors, list(tensors.infos), prefix, more)


def _as_without_metadata(file: Path, tensors: SafetensorsTensors, prefix: str) -> PeftConfig:
    """Return what diffusers takes for the config of a file that has none: alpha is then the rank, s = 1."""
    end = ".lora_B.weight"
    shapes = {name.removeprefix(prefix): info.shape for name, info in tensors.infos.items() if name.endswith(end)}
    ranks = {name.removesuffix(end): shape[1] for name, shape in shapes.items() if len(shape) == 2}
    if not ranks or 0 in ranks.values():
        raise UserError(f"{file}: holds {'an adapter of rank 0' if ranks else 'no tensor of an adapter'}")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in ranks.items() if other != rank}
    return PeftConfig(
        file=file,
        rank=rank,
        alpha=float(rank),
        dropout=0.0,
        use_rslora=False,
        use_dora=any("lora_magnitude_vector" in name for name in tensors.infos),
        target_modules=list(ranks),
        exclude_modules=[],
        rank_pattern=others,
        alpha_pattern={name: float(other) for name, other in others.items()},
    )
