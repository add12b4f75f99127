"""Open models on disk: config and tensors, of which only the parts that are asked for are read."""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainfw.errors import UserError, did_you_mean
from trainfw.formats import INDEX, SINGLE, SafetensorsTensors, Tensors, row_blocks
from trainfw.interop.configs import config_from_huggingface, unread_keys
from trainfw.interop.mapping import Parameter, parameters
from trainfw.interop.paths import PICKLES, blamed, model_kind, pickle_error, read_huggingface
from trainfw.json_text import TOKENIZER_LIMIT, json_object, read_member
from trainfw.models import ModelConfig
from trainfw.paths import resolve_path
from trainfw.utf8 import decode_utf8

Progress = Callable[[str, int, int | None], None]
"""Function called with (description, completed, total), in megabytes."""

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json"),
)
"""Files beside the weights that belong to a model."""


@dataclass(frozen=True)
class ModelSource:
    """A model of a Hugging Face directory or a GGUF file. Opening it reads its config and its headers."""

    path: Path
    config: ModelConfig
    huggingface: dict[str, Any]
    """config.json of the directory, or made for a GGUF file."""
    tensors: Tensors
    """Tensors by their Hugging Face names."""

    @property
    def family(self) -> str:
        return str(self.huggingface["model_type"])

    @functools.cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """Our parameters by path, with the tensors that each is made of."""
        return parameters(self.config, self.family)

    @functools.cached_property
    def dtype(self) -> str:
        """Dtype of most elements."""
        counts: Counter[str] = Counter()
        for info in self.tensors.infos.values():
            counts[str(info.dtype)] += info.size
        return counts.most_common(1)[0][0] if counts else "float32"

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, dtypes and sampled values of every tensor that the model uses."""
        return self.used().fingerprint()

    def used(self) -> Tensors:
        """Return the tensors that the model uses, in the order of our parameters, without a copy of a tied table."""
        used = copy.copy(self.tensors)
        used.infos = {name: self.tensors.infos[name] for each in self.parameters.values() for _, name in each.names()}
        return used

    def check(self) -> None:
        """Compare names and shapes of the tensors with the config; read no more than a few values.

        Raises UserError, with the tensors' names, where some are missing, unknown or of another shape.
        """
        infos = self.tensors.infos
        needed = sum(math.prod(parameter.shape[: parameter.stacked]) for parameter in self.parameters.values())
        if needed > 2 * len(infos) + 1000:  # before so many names are made
            raise UserError(f"config.json needs {needed:,} tensors, and the checkpoint has {len(infos):,}")
        shapes = {name: p.tensor_shape for p in self.parameters.values() for _, name in p.names()}
        if missing := set(shapes) - set(infos):
            hint = _prefixed(missing, set(infos))
            classes = str(self.huggingface.get("architectures"))[:80]
            if missing == {_HEAD} and "Classification" in classes:
                raise UserError(f"checkpoint: no tensor {_HEAD}: {classes} is a classifier, and no language model")
            if missing == {_HEAD} and not hint:
                hint = "; or its head is the embedding table: tie_word_embeddings: true"
            elif any(name.endswith("experts.gate_up_proj") for name in infos):
                hint = "; experts are stored in one tensor: save_pretrained(..., save_original_format=True) parts them"
            spare = sorted(set(infos) - set(shapes))  # if few are left over, one may be misspelled
            near = did_you_mean(min(missing), spare) if 0 < len(spare) <= 3 else ""
            raise UserError(f"checkpoint: no tensor {_some(missing)}{near}{hint}")
        # Ignored are a second copy of a tied table, and the rotary frequencies of an old checkpoint.
        tied = {_HEAD} if self.config.tie_embeddings else set()
        extra = {name for name in set(infos) - set(shapes) - tied if not name.endswith("rotary_emb.inv_freq")}
        if extra:
            raise UserError(f"checkpoint: the model has no place for tensor {_some(extra)}")
        for name, shape in shapes.items():
            if infos[name].shape != shape:
                raise UserError(f"checkpoint: tensor {name} has shape {infos[name].shape}, but the model needs {shape}")
        if self.config.tie_embeddings and _HEAD in infos and (row := self._differing_row(_HEAD, _TABLE)) is not None:
            raise UserError(
                f"checkpoint: tensor {_HEAD} differs from {_TABLE} (in row {row}), but config.json says that they are "
                "one: set tie_word_embeddings: false, and both are kept"
            )

    def _differing_row(self, one: str, other: str) -> int | None:
        """Return the first row in which two tensors differ in a bit, comparing a few megabytes at a time."""
        info = self.tensors.infos[one]
        if info != self.tensors.infos[other]:
            return 0
        for index in row_blocks(info.shape, info.dtype.itemsize):
            left, right = (self.tensors.read(name, index).view(np.uint8) for name in (one, other))
            if not np.array_equal(left, right):
                return index[0].start + int((left != right).any(axis=1).argmax())
        return None

    def read(
        self, path: str, like: jax.ShapeDtypeStruct | jax.Array, layer_order: Sequence[int] | None = None
    ) -> jax.Array:
        """Read one of our parameters, such as `layers.attention.query.kernel`, in the dtype and sharding of `like`.

        Each device's part is read by itself and put there before the next: the host holds one part at a time, and a
        part that several devices have is read once. Without a sharding, the array goes to the default device. Each
        process of a run reads for its own devices.

        Args:
            layer_order: the layer at each place of the stacked dim; by default their true order.

        Raises UserError where the model has no such parameter.
        """
        if path not in self.parameters:
            raise UserError(f"{self.path}: the model has no parameter {path}{did_you_mean(path, self.parameters)}")
        parameter, dtype = self.parameters[path], np.dtype(like.dtype)
        assert tuple(like.shape) == parameter.shape, f"{path}: {like.shape} for {parameter.shape}"
        order = None if parameter.stacked == 0 else layer_order
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
            whole = index or (slice(None),) * len(parameter.shape)
            bounds = tuple(part.indices(length)[:2] for part, length in zip(whole, parameter.shape))
            devices.setdefault(bounds, []).append(device)
        parts = []
        for bounds, holders in devices.items():
            value = parameter.read(self.tensors, tuple(slice(*bound) for bound in bounds), dtype, order)
            # Wait, so that this part's memory is free before the next takes its own.
            parts += [jax.block_until_ready(jax.device_put(value, device)) for device in holders]
            del value
        return jax.make_array_from_single_device_arrays(parameter.shape, sharding, parts)

    def copy_companions(self, directory: Path) -> None:
        """Copy the model's tokenizer, chat template and generation config into a directory.

        Raises UserError for a file that is not of its kind, or is a link elsewhere.
        """
        if self.path.is_dir():
            for name in COMPANIONS:
                if os.path.lexists(file := self.path / name):
                    (directory / name).write_bytes(_companion(file))


def _companion(file: Path) -> bytes:
    """Read a companion. Raises UserError where it is not of its kind."""
    data = read_member(file, TOKENIZER_LIMIT)
    if file.suffix == ".json":
        value = json_object(data, file)
        if file.name == "tokenizer.json" and not isinstance(value.get("model"), dict):
            raise UserError(f"{file}: expected a tokenizer, with a model")
    elif file.suffix != ".model":
        decode_utf8(data, file)
    elif not data.startswith(b"\n"):  # SentencePiece's protobuf: its first field is a list, of pieces
        raise UserError(f"{file}: expected a model of SentencePiece")
    return data


_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


def open_model(path: str | Path) -> ModelSource:
    """Open a Hugging Face directory or a GGUF file (or `package:NAME`), and check that its tensors fit its config.

    Headers are read now, weights when they are asked for. Raises UserError where there is no model, where it is damaged
    or of a family that `Transformer` does not have, and for a run, whose checkpoint needs the recipe.
    """
    resolved = resolve_path(path)
    kind = model_kind(resolved)
    if kind == "run":
        raise UserError(f"{resolved}: is a run; expected a Hugging Face directory or a .gguf file")
    if kind == "diffusers":
        raise UserError(f"{resolved}: is a model of diffusers, which writes no text; `trainfw export` reads it")
    with blamed(resolved):
        huggingface = read_huggingface(resolved)
        config = config_from_huggingface(huggingface)
        source = ModelSource(resolved, config, huggingface, _open_tensors(resolved, kind))
        source.check()
    if kind == "huggingface" and (unread := unread_keys(huggingface)):
        warnings.warn(
            f"{resolved}/config.json: not read: {', '.join(unread)} (Transformers' {source.family} computes nothing by "
            "it; code that came with the model may)",
            stacklevel=1,  # once, whoever opens it
        )
    return source


def _open_tensors(path: Path, kind: str) -> Tensors:
    if kind == "gguf":
        from trainfw.interop.gguf.reader import GGUFTensors

        return GGUFTensors(path)
    if not any(os.path.lexists(path / name) for name in (SINGLE, INDEX)):
        if pickles := sorted(file for file in path.iterdir() if file.suffix in PICKLES):
            raise pickle_error(pickles[0])
        raise UserError(f"{path}: has no weights: expected {SINGLE}, or {INDEX} and its shards")
    return SafetensorsTensors(path)


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:200] for name in sorted(names)[:3]) + more


def _prefixed(missing: set[str], present: set[str]) -> str:
    """Return advice if all missing names are present with one prefix, or without `model.`; else nothing."""
    first = min(missing)
    prefixes = {name.removesuffix(first) for name in present if name.endswith(f".{first}")}
    # `all` stops at the first name that is absent: a file may have as many prefixes as names.
    if shared := sorted(prefix for prefix in prefixes if all(prefix + name in present for name in missing)):
        under = f"; the same {len(missing)} are there under {shared[0][:80]!r}"
        return f"{under}, of what wrapped the model when saved: save the model within"
    if {name.removeprefix("model.") for name in missing} <= present - missing:
        return "; the same are there without 'model.': saved without its head's class; save ...ForCausalLM"
    return ""
