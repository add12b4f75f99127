"""Conversion of adapters to and from PEFT's form: adapter_config.json and adapter_model.safetensors.

Our arrays are stacked over layers, with matrices (in, out); PEFT has one tensor a layer, (out, in).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainfw.adapters import AdapterConfig, config_targets
from trainfw.errors import UserError
from trainfw.formats import SafetensorsTensors
from trainfw.interop.configs import config_to_huggingface
from trainfw.interop.mapping import parameters
from trainfw.interop.peft_config import CONFIG, read_peft_config
from trainfw.interop.peft_tensors import Places, StoredAdapter, named_tensors, written_config
from trainfw.interop.saving import new_directory
from trainfw.models import ModelConfig

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Tell whether a directory holds an adapter in PEFT's form."""
    return os.path.lexists(Path(path) / CONFIG)


def read_peft(path: str | os.PathLike[str], model: ModelConfig) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """Read an adapter of a model of this shape: its config, and its arrays by our names, in the dtype of the file.

    Our adapters have one rank and alpha in all layers: for layers with others, A and B are padded with zeros, and B
    (f32) is scaled, such that s A B is the same.

    Raises UserError where the directory holds no LoRA, rsLoRA or DoRA, where it has features besides, or tensors that
    do not fit the model.
    """
    places = _places(model)
    stored = _open_peft(path, model)
    modules = {module for layers in places.values() for module in layers.values()}
    if model.tie_embeddings and "lm_head" in stored.modules - modules:
        raise UserError(f"{stored.no_place(stored.tensor_of('lm_head'))}; the base's head is its embedding table")
    return stored.read(places)


_MODULES = {
    "q_proj": "layers.attention.query",
    "k_proj": "layers.attention.key",
    "v_proj": "layers.attention.value",
    "o_proj": "layers.attention.output",
    "gate_proj": "layers.mlp.gate",
    "up_proj": "layers.mlp.up",
    "down_proj": "layers.mlp.down",
    "embed_tokens": "embedding",
    "lm_head": "head",
}
"""Transformers' names of modules, in every family that PEFT adapts, and ours."""


def peft_fields(path: str | os.PathLike[str]) -> dict[str, object]:
    """Return the fields of `AdapterConfig` of an adapter in PEFT's form, without JAX and without reading its values.

    Raises UserError for an adapter that `read_peft` refuses for any model, and for modules that no decoder has.
    """
    return _open_peft(path).fields(lambda module: _MODULES[module.rpartition(".")[2]])


def _open_peft(path: str | os.PathLike[str], model: ModelConfig | None = None) -> StoredAdapter:
    """Open an adapter in PEFT's form. Raises UserError where what it holds is of no model, or not of `model`."""
    file = Path(path) / WEIGHTS
    config, tensors = read_peft_config(file.with_name(CONFIG)), SafetensorsTensors(path, WEIGHTS)
    names = []
    for name, info in tensors.infos.items():
        if name.removeprefix(_PREFIX) not in _COPIES:
            names.append(name)
        elif model is not None and info.shape != (expected := (model.vocab_size, model.hidden_size)):
            raise UserError(
                f"{file}: tensor {name} has shape {info.shape}; the base has {expected}: the adapter is "
                "of a resized model. Give that one as the base: make it with Transformers' "
                f"model.resize_token_embeddings({info.shape[0] if info.shape else 0}) and this tensor's "
                "values, and model.save_pretrained"
            )
    more = [] if model is None else [module for layers in _places(model).values() for module in layers.values()]
    stored = StoredAdapter(file, config, tensors, names, _PREFIX, more)
    if unknown := [name for (module, _), name in stored.names.items() if module.rpartition(".")[2] not in _MODULES]:
        raise stored.no_place(min(unknown))
    if config.use_dora and (table := next((m for m in stored.modules if m.endswith("embed_tokens")), None)):
        raise UserError(f"{config.file}: use_dora = true is not supported for {table}, an embedding")
    return stored


def peft_copies(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the copies of the base's own weights that PEFT saved with an adapter, by our names.

    PEFT saves them where the embedding or the head has an adapter, or where it is asked to (`save_embedding_layers`),
    and uses them in place of the base's.
    """
    tensors = SafetensorsTensors(path, WEIGHTS)
    copies = {name: _COPIES.get(name.removeprefix(_PREFIX)) for name in tensors.infos}
    return {
        own: tensors.read(name).T if own == "head.kernel" else tensors.read(name)
        for name, own in copies.items()
        if own is not None
    }


_COPIES = {
    f"{module}{layer}.weight": own
    for module, own in {"model.embed_tokens": "embedding.table", "lm_head": "head.kernel"}.items()
    for layer in (".base_layer", "")
}


def _places(model: ModelConfig) -> Places:
    """Return the modules of our linear maps and the embedding: our name -> place in the stack -> Transformers' name.

    Experts, which PEFT does not adapt one by one, are left out.
    """
    places = {}
    for path, parameter in parameters(model, config_to_huggingface(model)["model_type"]).items():
        name, _, leaf = path.rpartition(".")
        if leaf in ("kernel", "table") and not name.endswith("router") and parameter.stacked < 2:
            places[name] = {place: tensor.removesuffix(".weight") for place, tensor in parameter.names()}
    return places


def save_peft(
    directory: str | os.PathLike[str],
    config: AdapterConfig,
    arrays: Mapping[str, np.ndarray],
    model: ModelConfig,
    base: str | None,
) -> None:
    """Write an adapter as PEFT would.

    Args:
        arrays: our arrays by name.
        base: name of the model that it belongs to.

    Raises UserError where PEFT has no form for it, or the directory exists.
    """
    from safetensors.numpy import save

    sizes, places = config_targets(config, model), _places(model)
    if others := set(sizes) - set(places):
        raise UserError(f"{min(others)}: PEFT has no adapter of single experts; merge it into the model instead")

    suffixes = {name: [next(iter(places[name].values())).rpartition(".")[2]] for name in sizes}
    peft_config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **written_config(config, sizes, suffixes),
    }
    tensors = named_tensors(arrays, places, _PREFIX)
    with new_directory(directory) as temporary:
        (temporary / CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n", encoding="utf-8")
        # `save_file` would write files that no other user may read, whatever the umask.
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
