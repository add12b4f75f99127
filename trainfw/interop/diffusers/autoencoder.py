"""Autoencoders of diffusers' directories, both ways: config.json and one file of safetensors.

https://github.com/huggingface/diffusers: models/autoencoders/autoencoder_kl.py has the names and the defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainfw.errors import UserError, did_you_mean
from trainfw.formats import TensorInfo, cast
from trainfw.interop.diffusers.autoencoder_config import autoencoder_from_diffusers, autoencoder_to_diffusers
from trainfw.interop.diffusers.component import Component, check_tensors, open_tensors, opening, write_component
from trainfw.interop.mapping import parameter_shapes
from trainfw.interop.paths import CONFIG
from trainfw.json_text import read_json
from trainfw.models import AutoencoderConfig

_NAMES = (
    (r"down_(\d+)", r"down_blocks.\1"),
    (r"up_(\d+)", r"up_blocks.\1"),
    (r"residual_(\d+)", r"resnets.\1"),
    (r"\bmid\b", "mid_block"),
    (r"downsample\b", "downsamplers.0"),
    (r"upsample\b", "upsamplers.0"),
    (r"shortcut", "conv_shortcut"),
    (r"\bout\.norm", "conv_norm_out"),
    (r"\bout\.conv", "conv_out"),
    (r"attention\.norm", "attentions.0.group_norm"),
    (r"attention\.query", "attentions.0.to_q"),
    (r"attention\.key", "attentions.0.to_k"),
    (r"attention\.value", "attentions.0.to_v"),
    (r"attention\.output", "attentions.0.to_out.0"),
    (r"\.(kernel|scale)$", ".weight"),
)
"""Parts of our parameters' paths, and of diffusers' names."""
_BEFORE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of an attention's maps, and those that files of diffusers before 0.12 have, which it reads still."""


def tensor_name(path: str) -> str:
    """Return diffusers' name of one of our parameters, such as `encoder.down_0.residual_1.conv1.kernel`."""
    for ours, theirs in _NAMES:
        path = re.sub(ours, theirs, path)
    return path


def _turned(array: np.ndarray) -> np.ndarray:
    """Turn a kernel from our order of dims, (h, w, in, out) or (in, out), to diffusers', (out, in, h, w)."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _turned_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _turned(np.empty(shape, np.bool_)).shape


@dataclass(frozen=True)
class DiffusersAutoencoder(Component):
    """An autoencoder of a diffusers directory."""

    config: AutoencoderConfig
    names: Mapping[str, str]
    """Diffusers' name of each of our parameters, by path."""

    def array(self, path: str, dtype: str = "float32", layer_order: Sequence[int] | None = None) -> np.ndarray:
        """See `Component`; it has no stack, and `layer_order` is not read."""
        if path not in self.names:
            raise UserError(f"{self.path}: the model has no parameter {path}{did_you_mean(path, self.names)}")
        values = self.tensors.read(self.names[path])
        values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T
        return np.ascontiguousarray(cast(values, np.dtype(dtype), self.names[path]))


def open_autoencoder(path: str | os.PathLike[str]) -> DiffusersAutoencoder:
    """Open the directory of a diffusers autoencoder, and check that its tensors fit its config.

    Raises UserError where there is none, where it is damaged, or of a shape that `Autoencoder` does not have.
    """
    with opening(path, "autoencoder", "vae") as directory:
        config = autoencoder_from_diffusers(read_json(directory / CONFIG))
        tensors, shapes = open_tensors(directory), parameter_shapes(config)
        names = {path: _present(tensor_name(path), tensors.infos) for path in shapes}
        check_tensors(tensors.infos, {names[path]: _turned_shape(shape) for path, shape in shapes.items()})
    return DiffusersAutoencoder(directory, tensors, config, names)


def _present(name: str, infos: Mapping[str, TensorInfo]) -> str:
    """Return the name that a file has for a tensor: diffusers' older one where it has that alone."""
    older = name
    for new, old in _BEFORE.items():
        older = older.replace(f".{new}.", f".{old}.")
    return older if older in infos and name not in infos else name


def save_autoencoder(
    directory: str | os.PathLike[str],
    config: AutoencoderConfig,
    read: Callable[[str], object],
    *,
    dtype: str = "float32",
) -> None:
    """Write an autoencoder as diffusers would.

    Args:
        directory: a new one, which appears when everything is in it.
        read: function that returns a whole parameter by its path, an array of NumPy or JAX.
        dtype: dtype of the tensors.

    Raises UserError where the directory exists and is not empty, or a value is not finite.
    """
    shapes = parameter_shapes(config)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for path, shape in shapes.items():
            value = np.asarray(read(path))
            assert value.shape == shape, f"{path}: shape {value.shape}, but the model has {shape}"
            yield tensor_name(path), _turned(value)

    turned = {tensor_name(path): _turned_shape(shape) for path, shape in shapes.items()}
    write_component(directory, autoencoder_to_diffusers(config), turned, values(), dtype)
