"""Autoencoders of diffusers' directories, both ways: config.json and one file of safetensors.

https://github.com/huggingface/diffusers: models/autoencoders/autoencoder_kl.py has the names and the defaults.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from trainfw.errors import UserError, did_you_mean
from trainfw.formats import FLOATS, SafetensorsTensors, TensorInfo, cast
from trainfw.interop.diffusers.autoencoder_config import autoencoder_from_diffusers, autoencoder_to_diffusers
from trainfw.interop.mapping import parameter_shapes
from trainfw.interop.paths import CONFIG, blamed
from trainfw.interop.saving import new_directory, safetensors_header
from trainfw.json_text import read_json
from trainfw.models import Autoencoder, AutoencoderConfig
from trainfw.paths import resolve_path

WEIGHTS = "diffusion_pytorch_model.safetensors"

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


def _turned_back(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


@dataclass(frozen=True)
class DiffusersAutoencoder:
    """An autoencoder of a diffusers directory. Opening it reads its config and its header."""

    path: Path
    config: AutoencoderConfig
    tensors: SafetensorsTensors
    names: Mapping[str, str]
    """Diffusers' name of each of our parameters, by path."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each of our parameters, by path."""

    @property
    def dtype(self) -> str:
        """Dtype of the first tensor, as which all are stored."""
        return str(next(iter(self.tensors.infos.values())).dtype)

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, dtypes and sampled values of all tensors."""
        return self.tensors.fingerprint()

    def array(self, path: str, dtype: str = "float32") -> np.ndarray:
        """Read one of our parameters. Raises UserError where the model has no such parameter."""
        if path not in self.names:
            raise UserError(f"{self.path}: the model has no parameter {path}{did_you_mean(path, self.names)}")
        values = _turned_back(self.tensors.read(self.names[path]))
        return np.ascontiguousarray(cast(values, np.dtype(dtype), self.names[path]))

    def read(self, path: str, like: jax.ShapeDtypeStruct, layer_order: object = None) -> jax.Array:
        """Read one of our parameters in the dtype and sharding of `like`. It is in no stack: `layer_order` is not read.

        Raises UserError where it has another shape.
        """
        values = self.array(path, str(like.dtype))
        if values.shape != tuple(like.shape):
            raise UserError(f"{self.path}: {path} has shape {values.shape}; expected {tuple(like.shape)}")
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    def load(self) -> Autoencoder:
        """Return the model with its weights, in float32."""
        model: Autoencoder = nnx.eval_shape(lambda: Autoencoder(self.config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        for path, variable in nnx.to_flat_state(state):
            values = self.array(".".join(map(str, path)))
            variable.set_value(jax.numpy.asarray(values))
        return nnx.merge(graphdef, state)


def open_autoencoder(path: str | os.PathLike[str]) -> DiffusersAutoencoder:
    """Open the directory of a diffusers autoencoder, and check that its tensors fit its config.

    Raises UserError where there is none, where it is damaged, or of a shape that `Autoencoder` does not have.
    """
    directory = resolve_path(path)
    if not os.path.lexists(directory / CONFIG):
        hint = f"; its autoencoder is in {directory / 'vae'}" if (directory / "model_index.json").exists() else ""
        raise UserError(f"{directory}: is no model of diffusers: it has no {CONFIG}{hint}")
    with blamed(directory):
        config = autoencoder_from_diffusers(read_json(directory / CONFIG))
        if not os.path.lexists(directory / WEIGHTS):
            raise UserError(f"has no weights: expected {WEIGHTS}; only safetensors is read, in one file")
        tensors = SafetensorsTensors(directory, WEIGHTS)
        shapes = parameter_shapes(config)
        names = {path: _present(tensor_name(path), tensors.infos) for path in shapes}
        _check(tensors.infos, {names[path]: _turned(np.empty(shape, np.bool_)).shape for path, shape in shapes.items()})
    return DiffusersAutoencoder(directory, config, tensors, names, shapes)


def _present(name: str, infos: Mapping[str, TensorInfo]) -> str:
    """Return the name that a file has for a tensor: diffusers' older one where it has that alone."""
    older = name
    for new, old in _BEFORE.items():
        older = older.replace(f".{new}.", f".{old}.")
    return older if older in infos and name not in infos else name


def _check(infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in infos:
            raise UserError(f"{WEIGHTS}: no tensor {name}")
        if infos[name].shape != shape:
            raise UserError(f"{WEIGHTS}: tensor {name} has shape {infos[name].shape}, but the model needs {shape}")
    if extra := sorted(set(infos) - set(shapes)):
        raise UserError(f"{WEIGHTS}: the model has no place for tensor {extra[0][:200]}")


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
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    tensors = {}
    for path, shape in parameter_shapes(config).items():
        name, value = tensor_name(path), np.asarray(read(path))
        assert value.shape == shape, f"{path}: shape {value.shape}, but the model has {shape}"
        if not np.isfinite(value).all():
            raise UserError(f"tensor {name} has values that are not finite: nothing is written")
        tensors[name] = np.ascontiguousarray(_turned(cast(value, FLOATS[dtype], name)))
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}
    with new_directory(directory, sum(info.nbytes for info in infos.values())) as temporary:
        text = json.dumps(autoencoder_to_diffusers(config), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(f"{text}\n", "utf-8")
        with open(temporary / WEIGHTS, "wb") as stream:
            stream.write(safetensors_header(infos))
            for value in tensors.values():
                stream.write(value.reshape(-1).view(np.uint8).data)
