"""Adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, to and from ours.

Ours are stacked over layers, with matrices (in, out); theirs are one tensor a layer, (out, in).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainfw.adapters import AdapterConfig, PatternConfig, config_targets
from trainfw.errors import UserError
from trainfw.interop.configs import config_to_huggingface
from trainfw.interop.json_files import read_json
from trainfw.interop.mapping import parameters
from trainfw.interop.safetensors_reader import SafetensorsTensors
from trainfw.interop.saving import new_directory
from trainfw.models import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "init_lora_weights"),
)
_WITHOUT_EFFECT = (
    # Where an adapter comes from, and how to train it from its start.
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("runtime_config", "eva_config"),
    # They count beside other keys alone, which are refused: megatron_config, use_qalora.
    *("megatron_core", "qalora_group_size"),
)
_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights. The others (pissa, olora, corda, lora_ga, loftq) take A B at the start from the base."""


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter in PEFT's form."""
    return os.path.lexists(Path(path) / CONFIG)


def read_peft(path: str | os.PathLike[str], model: ModelConfig) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """An adapter of a model of this shape: its config, and its arrays by our names, in the dtype of the file.

    A rank or an alpha of its own in some layers is none in ours: there A and B are filled up with zeros, and B (f32) is
    scaled, such that s A B is the same.

    Raises UserError where the directory holds no LoRA, one with more to it than LoRA, rsLoRA and DoRA have, or tensors
    that do not fit the model.
    """
    directory = Path(path)
    config = _config(directory)
    tensors = SafetensorsTensors(directory, WEIGHTS)
    found = _found(directory, tensors, config, model)
    places = _places(model)
    sizes: dict[str, tuple[int, float]] = {}
    arrays: dict[str, np.ndarray] = {}
    modules = {module for theirs in places.values() for module in theirs.values()}
    if extra := [name for (module, _), name in found.items() if module not in modules]:
        tied = "; the base's head is its embedding table" if model.tie_embeddings and "lm_head" in min(extra) else ""
        raise UserError(f"{_no_place(directory, min(extra))}{tied}")
    adapted = {module for module, _ in found}
    for ours, theirs in places.items():
        missing = [module for module in theirs.values() if module not in adapted]
        if len(missing) == len(theirs) and not any(_targeted(config, module) for module in missing):
            continue
        if missing:
            raise UserError(
                f"{directory / WEIGHTS}: {ours} has no adapter in {missing[0]}; expected one in every layer"
            )
        layers = {index: _layer(directory, tensors, found, module) for index, module in theirs.items()}
        each = [_size(config, theirs[index], layer["lora_a"].shape[-1], directory) for index, layer in layers.items()]
        sizes[ours] = _common(config, each)
        stacked = _stacked(directory, ours, config, layers, each, sizes[ours])
        arrays |= {f"{ours}.adapter.{part}": value for part, value in stacked.items()}
    if not sizes:
        raise UserError(f"{directory / WEIGHTS}: holds no tensor of an adapter")
    return _ours(config, sizes), arrays


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
    """The fields of `AdapterConfig` that an adapter in PEFT's form gives a recipe, without JAX and without its values.

    Raises UserError for what `read_peft` refuses of any model's adapter, and for modules that are none of a decoder's.
    """
    directory = Path(path)
    config = _config(directory)
    tensors = SafetensorsTensors(directory, WEIGHTS)
    each: dict[str, list[tuple[int, float]]] = {}
    for (module, part), name in _found(directory, tensors, config).items():
        if (ours := _MODULES.get(module.rpartition(".")[2])) is None:
            raise _no_place(directory, name)
        if _PARTS[part] == "lora_a":
            rank = tensors.infos[name].shape[0] if tensors.infos[name].shape else 0
            each.setdefault(ours, []).append(_size(config, module, rank, directory))
    if not each:
        raise UserError(f"{directory / WEIGHTS}: holds no tensor of an adapter")
    return _ours(config, {ours: _common(config, sizes) for ours, sizes in each.items()}).model_dump(
        exclude_defaults=True
    )


def _found(
    directory: Path, tensors: SafetensorsTensors, config: Mapping[str, Any], model: ModelConfig | None = None
) -> dict[tuple[str, str], str]:
    """The adapter's tensors: (module, part) -> name in the file.

    Raises UserError for one that is no part of a LoRA, and of a module that the config does not target: PEFT would
    leave it out.
    """
    found: dict[tuple[str, str], str] = {}
    for name, info in tensors.infos.items():
        whole = name.removeprefix(_PREFIX)
        if whole in _COPIES:
            if model is not None and info.shape != (expected := (model.vocab_size, model.hidden_size)):
                raise UserError(
                    f"{directory / WEIGHTS}: tensor {name} has shape {info.shape}; the base has {expected}: the "
                    "adapter is of a resized model. Give that one as the base: make it with Transformers' "
                    f"model.resize_token_embeddings({info.shape[0] if info.shape else 0}) and this tensor's values, "
                    "and model.save_pretrained"
                )
            continue
        part = next((part for part in _PARTS if whole.endswith(f".{part}")), None)
        if part is None:
            raise _no_place(directory, name)
        module = whole.removesuffix(f".{part}")
        if not _targeted(config, module):
            raise UserError(f"{directory / WEIGHTS}: tensor {name} is of a module that {CONFIG} does not target")
        if config.get("use_dora") and module.endswith("embed_tokens"):
            raise UserError(f"{directory / CONFIG}: use_dora = true is not supported for {module}, an embedding")
        found[module, part] = name
    return found


def peft_copies(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The base's own weights that PEFT saves with an adapter, by our names: where the embedding or the head has one,
    and where asked to (`save_embedding_layers`).

    PEFT takes them in place of the base's.
    """
    tensors = SafetensorsTensors(Path(path), WEIGHTS)
    names = {_COPIES.get(name.removeprefix(_PREFIX)): name for name in tensors.infos}
    return {
        ours: tensors.read(name).T if ours == "head.kernel" else tensors.read(name)
        for ours, name in names.items()
        if ours is not None
    }


_COPIES = {
    f"{module}{layer}.weight": ours
    for module, ours in {"model.embed_tokens": "embedding.table", "lm_head": "head.kernel"}.items()
    for layer in (".base_layer", "")
}


def _no_place(directory: Path, tensor: str) -> UserError:
    return UserError(f"{directory / WEIGHTS}: the model has no place for tensor {tensor[:200]}")


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts an adapter on a module of this name."""

    def named(names: Any) -> bool:
        if names == "all-linear":
            return module.rpartition(".")[2] not in ("embed_tokens", "lm_head")
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names or ())

    return named(config["target_modules"]) and not named(config.get("exclude_modules"))


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


def _layer(
    directory: Path, tensors: SafetensorsTensors, found: Mapping[tuple[str, str], str], module: str
) -> dict[str, np.ndarray]:
    """The adapter of one linear map of one layer: A (in, r), B (r, out), and with DoRA the magnitude (out,)."""
    arrays: dict[str, np.ndarray] = {}
    for part, ours in _PARTS.items():
        if (name := found.get((module, part))) is not None:
            value = tensors.read(name)
            if value.ndim != (1 if ours == "magnitude" else 2):
                raise UserError(f"{directory / WEIGHTS}: tensor {name} has shape {value.shape}")
            arrays[ours] = value.T
    if missing := [part for part in ("lora_a", "lora_b") if part not in arrays]:
        raise UserError(f"{directory / WEIGHTS}: {module} has no tensor {missing[0][-1].upper()} beside the others")
    a, b = arrays["lora_a"], arrays["lora_b"]
    if a.shape[-1] != b.shape[-2]:
        raise UserError(f"{directory / WEIGHTS}: {module}: A has rank {a.shape[-1]}, and B {b.shape[-2]}")
    return arrays


def _stacked(
    directory: Path,
    ours: str,
    config: Mapping[str, Any],
    layers: Mapping[tuple[int, ...], dict[str, np.ndarray]],
    each: list[tuple[int, float]],
    common: tuple[int, float],
) -> dict[str, np.ndarray]:
    """The layers' arrays as one each; `each` are their ranks and alphas, `common` those of the whole."""
    scale = AdapterConfig(kind=_kind(config)).scale
    ordered = sorted(zip(layers, layers.values(), each), key=lambda layer: layer[0])
    parts: dict[str, list[np.ndarray]] = {}
    for _, arrays, (rank, alpha) in ordered:
        fill = (0, common[0] - rank)
        a, b = arrays["lora_a"], arrays["lora_b"]
        if (rank, alpha) != common:
            b = b.astype(np.float32) * np.float32(scale(rank, alpha) / scale(*common))
        own = arrays | {"lora_a": np.pad(a, ((0, 0), fill)), "lora_b": np.pad(b, (fill, (0, 0)))}
        for part, value in own.items():
            parts.setdefault(part, []).append(value)
    for part, values in parts.items():
        if len({value.shape for value in values}) > 1 or len(values) < len(layers):
            shapes = sorted({value.shape for value in values})
            raise UserError(f"{directory / WEIGHTS}: {ours}: {part} is not the same in every layer: shapes {shapes}")
    return {part: np.stack(values) if () not in layers else values[0] for part, values in parts.items()}


def _config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}: expected LORA")
    for key, value in config.items():
        # What is null, false or empty says that something is not used, whatever it is.
        if value and key not in _READ and key not in _WITHOUT_EFFECT and (key, value) != ("bias", "none"):
            raise UserError(f"{file}: {key} = {repr(value)[:80]} is not supported")
    if str(initial := config.get("init_lora_weights")).lower() not in _KEEP_THE_BASE:
        raise UserError(
            f"{file}: init_lora_weights = {initial!r}: not one that leaves the base's weights as they are "
            f"({', '.join(_KEEP_THE_BASE)}): A and B belong to a changed base, which the file does not hold; "
            "PEFT's save_pretrained(DIR, path_initial_model_for_weight_conversion=START) makes them those of the base"
        )
    _check_number(file, "r", config.get("r"), int)
    _check_number(file, "lora_alpha", config.get("lora_alpha"), (int, float))
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: lora_dropout = {dropout!r}: expected a number from 0 to less than 1")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key) or False, bool):
            raise UserError(f"{file}: {key} = {config[key]!r}: expected true or false")
    for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: {key} = {patterns!r}: expected an object")
        for pattern, value in patterns.items():
            _check_number(file, f"{key}.{pattern}", value, kind)
            _check_expression(file, key, pattern)
    _check_modules(file, config)
    return config


def _check_modules(file: Path, config: Mapping[str, Any]) -> None:
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key) or ([] if key == "exclude_modules" else None)
        if isinstance(names, str) and names != "all-linear":
            _check_expression(file, key, names)
        elif not isinstance(names, str | list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: {key} = {names!r}: expected a list of names")


def _check_expression(file: Path, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{file}: {key}: {pattern!r} is not a regular expression: {error}") from None


def _check_number(file: Path, key: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 1e9:
        raise UserError(f"{file}: {key} = {value!r}: expected a {'whole ' * (kind is int)}number above 0")


def _kind(config: Mapping[str, Any]) -> Literal["lora", "rslora", "dora"]:
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def _size(config: Mapping[str, Any], module: str, found: int, directory: Path) -> tuple[int, float]:
    """Rank and alpha of the adapter of one module, whose tensors have the rank `found`."""
    rank = _patterned(config.get("rank_pattern"), module, int(config["r"]))
    if found != rank:
        raise UserError(f"{directory}: {module} has rank {found}, but {CONFIG} says {rank}")
    alpha = float(_patterned(config.get("alpha_pattern"), module, config["lora_alpha"]))
    # Our DoRA scales by alpha / r.
    return rank, alpha * rank**0.5 if config.get("use_dora") and config.get("use_rslora") else alpha


def _common(config: Mapping[str, Any], each: list[tuple[int, float]]) -> tuple[int, float]:
    """Rank and alpha of the stacked layers, of those of each."""
    return each[0] if len(set(each)) == 1 else (max(rank for rank, _ in each), float(config["lora_alpha"]))


def _ours(config: Mapping[str, Any], sizes: Mapping[str, tuple[int, float]]) -> AdapterConfig:
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return AdapterConfig(
        kind=_kind(config),
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=list(sizes),
        patterns={
            ours: PatternConfig(rank=own[0], alpha=own[1]) for ours, own in sizes.items() if own != (rank, alpha)
        },
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
    from safetensors.numpy import save

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
        # Not by `save_file`, whose files no one else may read, whatever the umask.
        (temporary / WEIGHTS).write_bytes(save(dict(_tensors(arrays, places)), metadata={"format": "pt"}))


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
