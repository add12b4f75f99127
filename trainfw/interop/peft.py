"""Conversion of adapters to and from PEFT's form: adapter_config.json and adapter_model.safetensors.

Our arrays are stacked over layers, with matrices (in, out); PEFT has one tensor a layer, (out, in).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.adapters import AdapterConfig, PatternConfig, config_targets
from trainfw.errors import UserError
from trainfw.formats import SafetensorsTensors
from trainfw.interop.configs import config_to_huggingface
from trainfw.interop.mapping import parameters
from trainfw.interop.peft_config import CONFIG, read_peft_config
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
    stored, places = _Stored(path, model), _places(model)
    sizes: dict[str, tuple[int, float]] = {}
    arrays: dict[str, np.ndarray] = {}
    modules = {module for layers in places.values() for module in layers.values()}
    if extra := [name for (module, _), name in stored.names.items() if module not in modules]:
        tied = "; the base's head is its embedding table" if model.tie_embeddings and "lm_head" in min(extra) else ""
        raise UserError(f"{stored.no_place(min(extra))}{tied}")
    adapted = {module for module, _ in stored.names}
    for name, by_layer in places.items():
        missing = [module for module in by_layer.values() if module not in adapted]
        if len(missing) == len(by_layer) and not any(module in stored.sizes for module in missing):
            continue
        if missing:
            raise UserError(f"{stored.file}: {name} has no adapter in {missing[0]}; expected one in every layer")
        layers = [(index, stored.layer(module)) for index, module in sorted(by_layer.items())]
        each = [stored.size(by_layer[index], layer["lora_a"].shape[-1]) for index, layer in layers]
        sizes[name] = stored.common(each)
        stacked = stored.stacked(name, [layer for _, layer in layers], each, sizes[name])
        whole = {part: values[0] if () in by_layer else np.stack(values) for part, values in stacked.items()}
        arrays |= {f"{name}.adapter.{part}": value for part, value in whole.items()}
    return stored.adapter_config(sizes), arrays


_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
}
"""Ends of PEFT's tensor names, and our names of these parts."""

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
    stored = _Stored(path)
    each: dict[str, list[tuple[int, float]]] = {}
    for (module, part), name in stored.names.items():
        if _PARTS[part] == "lora_a":
            shape = stored.tensors.infos[name].shape
            size = stored.size(module, shape[0] if shape else 0)
            each.setdefault(_MODULES[module.rpartition(".")[2]], []).append(size)
    sizes = {path: stored.common(sizes) for path, sizes in each.items()}
    return stored.adapter_config(sizes).model_dump(exclude_defaults=True)


class _Stored:
    """An adapter in PEFT's form: its config, and the names of its tensors by (module, part).

    Raises UserError for a tensor that is no part of a LoRA, or belongs to a module that the config does not target:
    PEFT would leave it out.
    """

    def __init__(self, path: str | os.PathLike[str], model: ModelConfig | None = None) -> None:
        self.file = Path(path) / WEIGHTS
        self.config = read_peft_config(self.file.with_name(CONFIG))
        self.tensors = SafetensorsTensors(path, WEIGHTS)
        self.names: dict[tuple[str, str], str] = {}
        modules = {
            name.removeprefix(_PREFIX).removesuffix(f".{part}") for name in self.tensors.infos for part in _PARTS
        }
        if model is not None:
            modules.update(module for layers in _places(model).values() for module in layers.values())
        self.sizes = self.config.sizes(modules)
        for name, info in self.tensors.infos.items():
            whole = name.removeprefix(_PREFIX)
            if whole in _COPIES:
                if model is not None and info.shape != (expected := (model.vocab_size, model.hidden_size)):
                    raise UserError(
                        f"{self.file}: tensor {name} has shape {info.shape}; the base has {expected}: the adapter is "
                        "of a resized model. Give that one as the base: make it with Transformers' "
                        f"model.resize_token_embeddings({info.shape[0] if info.shape else 0}) and this tensor's "
                        "values, and model.save_pretrained"
                    )
                continue
            part = next((part for part in _PARTS if whole.endswith(f".{part}")), "")
            module = whole.removesuffix(f".{part}")
            if not part or module.rpartition(".")[2] not in _MODULES:
                raise self.no_place(name)
            if module not in self.sizes:
                raise UserError(f"{self.file}: tensor {name[:200]} is of a module that {CONFIG} does not target")
            if self.config.use_dora and module.endswith("embed_tokens"):
                config = self.file.with_name(CONFIG)
                raise UserError(f"{config}: use_dora = true is not supported for {module}, an embedding")
            self.names[module, part] = name

    def no_place(self, tensor: str) -> UserError:
        return UserError(f"{self.file}: the model has no place for tensor {tensor[:200]}")

    def layer(self, module: str) -> dict[str, np.ndarray]:
        """Read the adapter of one map of one layer: A (in, r), B (r, out), and with DoRA the magnitude (out,)."""
        arrays: dict[str, np.ndarray] = {}
        for part, own in _PARTS.items():
            if (name := self.names.get((module, part))) is not None:
                value = self.tensors.read(name)
                if value.ndim != (1 if own == "magnitude" else 2):
                    raise UserError(f"{self.file}: tensor {name} has shape {value.shape}")
                arrays[own] = value.T
        if missing := [part for part in ("lora_a", "lora_b") if part not in arrays]:
            raise UserError(f"{self.file}: {module} has no tensor {missing[0][-1].upper()} beside the others")
        ranks = arrays["lora_a"].shape[-1], arrays["lora_b"].shape[-2]
        if ranks[0] != ranks[1]:
            raise UserError(f"{self.file}: {module}: A has rank {ranks[0]}, and B {ranks[1]}")
        return arrays

    def stacked(
        self, path: str, layers: list[dict[str, np.ndarray]], each: list[tuple[int, float]], common: tuple[int, float]
    ) -> dict[str, list[np.ndarray]]:
        """Bring the arrays of the layers, which have the sizes (rank, alpha) `each`, to the size `common`."""
        scale = AdapterConfig(kind=self.config.kind).scale
        parts: dict[str, list[np.ndarray]] = {}
        for arrays, (rank, alpha) in zip(layers, each):
            fill = (0, common[0] - rank)
            a, b = arrays["lora_a"], arrays["lora_b"]
            if (rank, alpha) != common:
                b = b.astype(np.float32) * np.float32(scale(rank, alpha) / scale(*common))
            padded = arrays | {"lora_a": np.pad(a, ((0, 0), fill)), "lora_b": np.pad(b, (fill, (0, 0)))}
            for part, value in padded.items():
                parts.setdefault(part, []).append(value)
        for part, values in parts.items():
            shapes = sorted({value.shape for value in values})
            if len(shapes) > 1 or len(values) < len(layers):
                raise UserError(f"{self.file}: {path}: {part} is not the same in every layer: shapes {shapes}")
        return parts

    def size(self, module: str, stored_rank: int) -> tuple[int, float]:
        """Return rank and alpha of one module's adapter. Raises UserError where its tensors have another rank."""
        rank, alpha = self.sizes[module]
        if stored_rank != rank:
            raise UserError(f"{self.file.parent}: {module} has rank {stored_rank}, but {CONFIG} says {rank}")
        return rank, alpha

    def common(self, each: list[tuple[int, float]]) -> tuple[int, float]:
        """Return rank and alpha of stacked layers that have the sizes `each`."""
        return each[0] if len(set(each)) == 1 else (max(rank for rank, _ in each), self.config.alpha)

    def adapter_config(self, sizes: Mapping[str, tuple[int, float]]) -> AdapterConfig:
        if not sizes:
            raise UserError(f"{self.file}: holds no tensor of an adapter")
        rank, alpha = self.config.rank, self.config.alpha
        others = {path: PatternConfig(rank=r, alpha=a) for path, (r, a) in sizes.items() if (r, a) != (rank, alpha)}
        fields: dict[str, Any] = {"kind": self.config.kind, "dropout": self.config.dropout, "targets": list(sizes)}
        return AdapterConfig(rank=rank, alpha=alpha, patterns=others, **fields)


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


def _places(model: ModelConfig) -> dict[str, dict[tuple[int, ...], str]]:
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

    def plain(number: float) -> float:
        return int(number) if number == int(number) else number

    suffixes = {name: next(iter(places[name].values())).rpartition(".")[2] for name in sizes}
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.kind == "rslora",
        "use_dora": config.kind == "dora",
        "target_modules": sorted(suffixes.values()),
        "rank_pattern": {suffixes[name]: rank for name, (rank, _) in sizes.items() if rank != config.rank},
        "alpha_pattern": {suffixes[name]: plain(alpha) for name, (_, alpha) in sizes.items() if alpha != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors: dict[str, np.ndarray] = {}
    for path, value in arrays.items():
        name, _, leaf = path.rpartition(".adapter.")
        part = next(p for p, own in _PARTS.items() if own == leaf and ("embedding" in p) == (name == "embedding"))
        for index, module in places[name].items():
            array = value[index] if index else value
            tensors[f"{_PREFIX}{module}.{part}"] = np.ascontiguousarray(array if leaf == "magnitude" else array.T)
    with new_directory(directory) as temporary:
        (temporary / CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n", encoding="utf-8")
        # `save_file` would write files that no other user may read, whatever the umask.
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
