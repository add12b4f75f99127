"""Adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, to and from ours.

Ours are stacked over layers, with matrices (in, out); theirs are one tensor a layer, (out, in).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.adapters import AdapterConfig, PatternConfig, config_targets
from trainfw.errors import UserError, did_you_mean
from trainfw.interop.configs import config_to_huggingface
from trainfw.interop.json_files import read_json
from trainfw.interop.mapping import parameters
from trainfw.interop.safetensors_reader import SafetensorsTensors
from trainfw.interop.saving import new_directory
from trainfw.models import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REFUSED = {
    # What an adapter may be beside what is read here, and the value that says it is not.
    "modules_to_save": None,
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "megatron_config": None,
    "corda_config": None,
    "exclude_modules": None,
    "layer_replication": None,
}


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter in PEFT's form."""
    return (Path(path) / CONFIG).is_file()


def read_peft(path: str | os.PathLike[str], model: ModelConfig) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """An adapter of a model of this shape: its config, and its arrays by our names, in the dtype of the file.

    Raises UserError where the directory holds no LoRA, one with more to it than LoRA, rsLoRA and DoRA have, or tensors
    that do not fit the model.
    """
    directory = Path(path)
    config = _config(directory)
    tensors = SafetensorsTensors(directory, WEIGHTS)
    found = {name.removeprefix(_PREFIX): name for name in tensors.infos}
    places = _places(model)
    for module in ("model.embed_tokens", "lm_head"):
        # PEFT saves the base's own beside adapters of these: the base is given here.
        if (copy := found.pop(f"{module}.base_layer.weight", None)) is not None:
            shape, expected = tensors.infos[copy].shape, (model.vocab_size, model.hidden_size)
            if shape != expected:
                raise UserError(f"{directory / WEIGHTS}: tensor {copy} has shape {shape}; the base has {expected}")
    ranks: dict[str, int] = {}
    arrays: dict[str, np.ndarray] = {}
    for ours, theirs in places.items():
        here = {index: module for index, module in theirs.items() if any(f"{module}.{p}" in found for p in _PARTS)}
        if not here:
            continue
        if missing := [module for index, module in theirs.items() if index not in here]:
            raise UserError(
                f"{directory / WEIGHTS}: {ours} has no adapter in {missing[0]}; expected one in every layer"
            )
        for part in _PARTS:
            names = {index: found.pop(f"{module}.{part}", None) for index, module in theirs.items()}
            if all(name is None for name in names.values()):
                continue
            if none := [theirs[index] for index, name in names.items() if name is None]:
                raise UserError(f"{directory / WEIGHTS}: no tensor {_PREFIX}{none[0]}.{part}")
            arrays[f"{ours}.adapter.{_PARTS[part]}"] = _stacked(directory, tensors, names, part)
        a, b = (arrays.get(f"{ours}.adapter.lora_{x}") for x in "ab")
        if a is None or b is None:
            raise UserError(f"{directory / WEIGHTS}: {ours} has only one of A and B")
        if a.shape[-1] != b.shape[-2]:
            raise UserError(f"{directory / WEIGHTS}: {ours}: A has rank {a.shape[-1]}, and B {b.shape[-2]}")
        ranks[ours] = a.shape[-1]
    if found:
        raise UserError(
            f"{directory / WEIGHTS}: the model has no place for tensor {min(found.values())}"
            f"{did_you_mean(min(found), [m for modules in places.values() for m in modules.values()])}"
        )
    if not ranks:
        raise UserError(f"{directory / WEIGHTS}: holds no tensor of an adapter")
    return _ours(config, ranks, places, directory), arrays


_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
}


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
"""Their names of modules, in every family that PEFT adapts, and ours."""


def peft_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of `AdapterConfig` that an adapter in PEFT's form gives a recipe, from its config alone, without JAX.

    Raises UserError for names of modules that are none of a decoder's.
    """
    config = _config(Path(path))
    modules = config.get("target_modules")
    if modules == "all-linear":
        modules = [name for name in _MODULES if name not in ("embed_tokens", "lm_head")]
    elif isinstance(modules, str):  # a regular expression of whole names
        blocks = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
        wholes = {f"model.layers.0.{block}.{name}": name for block, names in blocks.items() for name in names}
        wholes |= {"model.embed_tokens": "embed_tokens", "lm_head": "lm_head"}
        try:
            modules = [name for whole, name in wholes.items() if re.fullmatch(modules, whole)] or modules
        except re.error as error:
            raise UserError(f"{Path(path) / CONFIG}: target_modules = {modules!r}: {error}") from None
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{Path(path) / CONFIG}: target_modules = {modules!r}: expected a list of names")
    ends = [name.rpartition(".")[2] for name in modules]
    if unknown := [name for name in ends if name not in _MODULES]:
        raise UserError(
            f"{Path(path) / CONFIG}: target_modules: {unknown[0]!r} is not known{did_you_mean(unknown[0], _MODULES)}"
        )
    ranks = {_MODULES[end]: end for end in ends}
    places = {ours: {(): end} for ours, end in ranks.items()}
    sizes = {ours: _patterned(config.get("rank_pattern"), end, int(config["r"])) for ours, end in ranks.items()}
    return _ours(config, sizes, places, Path(path)).model_dump(exclude_defaults=True)


def _places(model: ModelConfig) -> dict[str, dict[tuple[int, ...], str]]:
    """Our linear maps and the embedding -> index among the stacked -> their module. Experts, which PEFT does not
    adapt one by one, are left out.
    """
    found = {}
    for path, parameter in parameters(model, config_to_huggingface(model)["model_type"]).items():
        name, _, leaf = path.rpartition(".")
        if leaf in ("kernel", "table") and not name.endswith("router") and parameter.stacked < 2:
            found[name] = {place: tensor.removesuffix(".weight") for place, tensor in parameter.names()}
    return found


def _stacked(
    directory: Path, tensors: SafetensorsTensors, names: Mapping[tuple[int, ...], str | None], part: str
) -> np.ndarray:
    values = {}
    for index, name in names.items():
        assert name is not None
        value = tensors.read(name)
        values[index] = value if part == "lora_magnitude_vector" else value.T
    shapes = {value.shape for value in values.values()}
    if len(shapes) > 1:
        raise UserError(f"{directory / WEIGHTS}: {part} differs in shape between layers: {sorted(shapes)}")
    if () in values:
        return np.ascontiguousarray(values[()])
    return np.stack([values[index] for index in sorted(values)])


def _config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}: expected LORA")
    for key, default in _REFUSED.items():
        if config.get(key) and config[key] != default:
            raise UserError(f"{file}: {key} = {config[key]!r} is not supported")
    _check_number(file, "r", config.get("r"), int)
    _check_number(file, "lora_alpha", config.get("lora_alpha"), (int, float))
    for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: {key} = {patterns!r}: expected an object")
        for pattern, value in patterns.items():
            _check_number(file, f"{key}.{pattern}", value, kind)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{file}: {key}: {pattern!r} is not a regular expression: {error}") from None
    return config


def _check_number(file: Path, key: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 1e9:
        raise UserError(f"{file}: {key} = {value!r}: expected a {'whole ' * (kind is int)}number above 0")


def _ours(
    config: Mapping[str, Any], ranks: Mapping[str, int], places: Mapping[str, Mapping[Any, str]], directory: Path
) -> AdapterConfig:
    rank = int(config["r"])
    patterns = {}
    for ours, found in ranks.items():
        module = next(iter(places[ours].values()))
        expected = _patterned(config.get("rank_pattern"), module, rank)
        alpha = float(_patterned(config.get("alpha_pattern"), module, config["lora_alpha"]))
        if found != expected:
            raise UserError(f"{directory}: {module} has rank {found}, but {CONFIG} says {expected}")
        if config.get("use_dora") and config.get("use_rslora"):
            alpha *= found**0.5  # our DoRA scales by alpha / r
        if (found, alpha) != (rank, float(config["lora_alpha"])):
            patterns[ours] = PatternConfig(rank=found, alpha=alpha)
    return AdapterConfig(
        kind="dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        rank=rank,
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=list(ranks),
        patterns=patterns,
    )


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """As PEFT looks a module up: the first pattern that matches the end of its name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def peft_problem(config: AdapterConfig, model: ModelConfig) -> str | None:
    """Why PEFT has no form for this adapter, or None."""
    others = set(config_targets(config, model)) - set(_places(model))
    return f"{min(others)}: PEFT has no adapter of single experts; merge it into the model instead" if others else None


def save_peft(
    directory: str | os.PathLike[str],
    config: AdapterConfig,
    arrays: Mapping[str, np.ndarray],
    model: ModelConfig,
    base: str | None,
) -> None:
    """Write an adapter as PEFT would. `arrays` are ours by name; `base` names the model that it belongs to.

    Raises UserError where PEFT has no form for it, or something is already there.
    """
    from safetensors.numpy import save_file

    if problem := peft_problem(config, model):
        raise UserError(problem)
    sizes = config_targets(config, model)
    places = _places(model)
    suffixes = {name: next(iter(places[name].values())).rpartition(".")[2] for name in sizes}
    theirs = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.kind == "rslora",
        "use_dora": config.kind == "dora",
        "target_modules": sorted(suffixes.values()),
        "rank_pattern": {suffixes[name]: rank for name, (rank, _) in sizes.items() if rank != config.rank},
        "alpha_pattern": {suffixes[name]: _plain(alpha) for name, (_, alpha) in sizes.items() if alpha != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_directory(directory) as temporary:
        (temporary / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
        save_file(dict(_tensors(arrays, places)), temporary / WEIGHTS, metadata={"format": "pt"})


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _tensors(
    arrays: Mapping[str, np.ndarray], places: Mapping[str, Mapping[tuple[int, ...], str]]
) -> Iterator[tuple[str, np.ndarray]]:
    for path, value in arrays.items():
        name, _, leaf = path.rpartition(".adapter.")
        embedding = name == "embedding"
        part = next(p for p, mine in _PARTS.items() if mine == leaf and ("embedding" in p) == embedding)
        for index, module in places[name].items():
            own = value[index] if index else value
            yield f"{_PREFIX}{module}.{part}", np.ascontiguousarray(own if leaf == "magnitude" else own.T)
