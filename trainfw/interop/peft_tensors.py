"""Tensors of adapters as PEFT names them, whatever file they are in.

Our arrays are stacked over layers, with matrices (in, out); PEFT has one tensor a layer, (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.adapters import AdapterConfig, PatternConfig
from trainfw.errors import UserError
from trainfw.formats import SafetensorsTensors
from trainfw.interop.peft_config import PeftConfig

Places = Mapping[str, Mapping[tuple[int, ...], str]]
"""Modules of another library by our names and their place in the stack: () where a module is by itself."""
_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
}
"""Ends of PEFT's tensor names, and our names of these parts."""


class StoredAdapter:
    """Tensors of a LoRA that are named as PEFT does, in a file of any name: by (module, part).

    Raises UserError for a tensor that is no part of a LoRA, or belongs to a module that the config does not target:
    PEFT would leave it out.

    Args:
        names: those of its tensors that are to be an adapter's.
        prefix: what the names of all begin with, or may.
        more: modules that may be targeted, beside those that have tensors.
    """

    def __init__(
        self,
        file: Path,
        config: PeftConfig,
        tensors: SafetensorsTensors,
        names: Collection[str],
        prefix: str,
        more: Collection[str] = (),
    ) -> None:
        self.file, self.config, self.tensors = file, config, tensors
        self.names: dict[tuple[str, str], str] = {}
        for name in names:
            whole = name.removeprefix(prefix)
            part = next((part for part in _PARTS if whole.endswith(f".{part}")), "")
            if not part:
                raise self.no_place(name)
            self.names[whole.removesuffix(f".{part}"), part] = name
        self.sizes = self.config.sizes(dict.fromkeys([*self.modules, *more]))
        for (module, _), name in self.names.items():
            if module not in self.sizes:
                raise UserError(
                    f"{self.file}: tensor {name[:200]} is of a module that {self.config.file.name} does not target"
                )

    @property
    def modules(self) -> set[str]:
        return {module for module, _ in self.names}

    def tensor_of(self, module: str) -> str:
        return min(name for (of, _), name in self.names.items() if of == module)

    def read(self, places: Places) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
        """Return the config, and the arrays by our names. Raises UserError where they do not fit the places."""
        sizes: dict[str, tuple[int, float]] = {}
        arrays: dict[str, np.ndarray] = {}
        adapted = self.modules
        if extra := adapted - {module for layers in places.values() for module in layers.values()}:
            raise self.no_place(min(map(self.tensor_of, extra)))
        for name, by_layer in places.items():
            missing = [module for module in by_layer.values() if module not in adapted]
            if len(missing) == len(by_layer) and not any(module in self.sizes for module in missing):
                continue
            if missing:
                raise UserError(f"{self.file}: {name} has no adapter in {missing[0]}; expected one in every layer")
            layers = [(index, self.layer(module)) for index, module in sorted(by_layer.items())]
            each = [self.size(by_layer[index], layer["lora_a"].shape[-1]) for index, layer in layers]
            sizes[name] = self.common(each)
            stacked = self.stacked(name, [layer for _, layer in layers], each, sizes[name])
            whole = {part: values[0] if () in by_layer else np.stack(values) for part, values in stacked.items()}
            arrays |= {f"{name}.adapter.{part}": value for part, value in whole.items()}
        return self.adapter_config(sizes), arrays

    def fields(self, own: Callable[[str], str]) -> dict[str, object]:
        """Return the fields of `AdapterConfig`; `own` gives our name of a module."""
        each: dict[str, list[tuple[int, float]]] = {}
        for (module, part), name in self.names.items():
            if _PARTS[part] == "lora_a":
                shape = self.tensors.infos[name].shape
                each.setdefault(own(module), []).append(self.size(module, shape[0] if shape else 0))
        sizes = {path: self.common(sizes) for path, sizes in each.items()}
        return self.adapter_config(sizes).model_dump(exclude_defaults=True)

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
            raise UserError(
                f"{self.file.parent}: {module} has rank {stored_rank}, but {self.config.file.name} says {rank}"
            )
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


def named_tensors(arrays: Mapping[str, np.ndarray], places: Places, prefix: str) -> dict[str, np.ndarray]:
    """Return an adapter's arrays, by our names, as PEFT's tensors."""
    tensors: dict[str, np.ndarray] = {}
    for path, value in arrays.items():
        name, _, leaf = path.rpartition(".adapter.")
        part = next(p for p, own in _PARTS.items() if own == leaf and ("embedding" in p) == (name == "embedding"))
        for index, module in places[name].items():
            array = value[index] if index else value
            tensors[f"{prefix}{module}.{part}"] = np.ascontiguousarray(array if leaf == "magnitude" else array.T)
    return tensors


def written_config(
    config: AdapterConfig, sizes: Mapping[str, tuple[int, float]], names: Mapping[str, Collection[str]]
) -> dict[str, object]:
    """Return the keys of PEFT's LoraConfig of an adapter.

    Args:
        sizes: rank and alpha by our names.
        names: modules, or ends of their names, by our names.
    """

    def plain(number: float) -> float:
        return int(number) if number == int(number) else number

    each = [(name, *sizes[own]) for own in sizes for name in names[own]]
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.kind == "rslora",
        "use_dora": config.kind == "dora",
        "target_modules": sorted(name for name, _, _ in each),
        "rank_pattern": {name: rank for name, rank, _ in each if rank != config.rank},
        "alpha_pattern": {name: plain(alpha) for name, _, alpha in each if alpha != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
