"""Diffusion transformers of diffusers' directories, both ways: config.json and one file of safetensors."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from trainfw.errors import UserError, did_you_mean
from trainfw.formats import FLOATS, SafetensorsTensors, TensorInfo, cast
from trainfw.interop.diffusers.names import NAMES, POSITIONS, Form
from trainfw.interop.diffusers.transformer_config import CLASSES, transformer_from_diffusers, transformer_to_diffusers
from trainfw.interop.mapping import parameter_shapes
from trainfw.interop.paths import CONFIG, blamed
from trainfw.interop.saving import new_directory, safetensors_header
from trainfw.json_text import read_json
from trainfw.models import DiT, DiTConfig, position_rows
from trainfw.paths import resolve_path

WEIGHTS = "diffusion_pytorch_model.safetensors"
_TOLERANCE = {2: 1e-2, 4: 1e-4, 8: 1e-4}
"""Largest error of positions in a file, by the bytes of its numbers."""


@dataclass(frozen=True)
class _Parameter:
    """One of our parameters, and the tensors that it is made of."""

    form: Form
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Tensors, one for each layer where it is stacked, else copies of one another."""
    stacked: bool
    patch_size: int

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        if self.form == "transposed":
            return shape[::-1]
        size = self.patch_size
        return (shape[1], shape[0] // size**2, size, size) if self.form == "patch" else shape

    def theirs(self, value: np.ndarray) -> np.ndarray:
        """Return a layer of ours, or all of it, as the tensor is laid out."""
        if self.form == "patch":
            return value.reshape(self.patch_size, self.patch_size, -1, value.shape[-1]).transpose(3, 2, 0, 1)
        return value.T if self.form == "transposed" else value

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """Do the opposite of `theirs`."""
        if self.form == "patch":
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
        return tensor.T if self.form == "transposed" else tensor


def _parameters(config: DiTConfig) -> dict[str, _Parameter]:
    """Return every parameter of a model by its path."""
    rows = {row.path: row for row in NAMES[CLASSES[config.conditioning]]}
    found = {}
    for path, shape in parameter_shapes(config).items():
        row, stacked = rows[path], path.startswith("layers.")
        count = shape[0] if stacked else config.num_layers
        names = dict.fromkeys(row.tensor.format(layer=layer, last=config.num_layers - 1) for layer in range(count))
        found[path] = _Parameter(row.form, shape, tuple(names), stacked, config.patch_size)
    return found


@dataclass(frozen=True)
class DiffusersTransformer:
    """A diffusion transformer of a diffusers directory. Opening it reads its config and its header."""

    path: Path
    config: DiTConfig
    tensors: SafetensorsTensors
    parameters: Mapping[str, _Parameter]

    @property
    def dtype(self) -> str:
        """Dtype of the first tensor, as which all are stored."""
        return str(next(iter(self.tensors.infos.values())).dtype)

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, dtypes and sampled values of all tensors."""
        return self.tensors.fingerprint()

    def array(self, path: str, dtype: str = "float32", layer_order: Sequence[int] | None = None) -> np.ndarray:
        """Read one of our parameters, such as `layers.attention.query.kernel`.

        Args:
            layer_order: the layer at each place of the stacked dim; by default their true order.

        Raises UserError where the model has no such parameter.
        """
        if path not in self.parameters:
            raise UserError(f"{self.path}: the model has no parameter {path}{did_you_mean(path, self.parameters)}")
        parameter = self.parameters[path]
        if not parameter.stacked:
            return np.ascontiguousarray(self._read(parameter, parameter.names[0], dtype))
        out = np.empty(parameter.shape, FLOATS[dtype])
        for place, layer in enumerate(layer_order or range(len(parameter.names))):
            out[place] = self._read(parameter, parameter.names[layer], dtype)
        return out

    def _read(self, parameter: _Parameter, name: str, dtype: str) -> np.ndarray:
        return cast(parameter.ours(self.tensors.read(name)), FLOATS[dtype], name)

    def read(
        self, path: str, like: jax.ShapeDtypeStruct | jax.Array, layer_order: Sequence[int] | None = None
    ) -> jax.Array:
        """Read one of our parameters in the dtype and sharding of `like`; the host holds one at a time."""
        values = self.array(path, str(like.dtype), layer_order)
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    def load(self) -> DiT:
        """Return the model with its weights, in float32."""
        model: DiT = nnx.eval_shape(lambda: DiT(self.config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        for path, variable in nnx.to_flat_state(state):
            variable.set_value(jax.numpy.asarray(self.array(".".join(map(str, path)))))
        return nnx.merge(graphdef, state)

    def check(self) -> None:
        """Compare names and shapes of the tensors with the config, and copies of a tensor with one another.

        Raises UserError, with the tensor's name, where they do not fit.
        """
        infos = self.tensors.infos
        shapes = {name: p.tensor_shape for p in self.parameters.values() for name in p.names}
        if self.config.largest_grid is not None:
            shapes[POSITIONS] = (1, self.config.largest_grid**2, self.config.hidden_size)
        for name, shape in shapes.items():
            if name not in infos:
                raise UserError(f"{WEIGHTS}: no tensor {name}")
            if infos[name].shape != shape:
                raise UserError(f"{WEIGHTS}: tensor {name} has shape {infos[name].shape}, but the model needs {shape}")
        if extra := sorted(set(infos) - set(shapes)):
            raise UserError(f"{WEIGHTS}: the model has no place for tensor {extra[0][:200]}")
        for first, *copies in (p.names for p in self.parameters.values() if not p.stacked):
            for name in copies:
                if not np.array_equal(self.tensors.read(first), self.tensors.read(name)):
                    raise UserError(
                        f"{WEIGHTS}: tensor {name} differs from {first}: times and classes that each layer embeds in "
                        "a way of its own are not supported"
                    )
        for row, expected in enumerate(_positions(self.config)):
            index = (slice(0, 1), slice(row * len(expected), (row + 1) * len(expected)))
            found = self.tensors.read(POSITIONS, index)[0]
            if not np.allclose(found.astype(np.float32), expected, rtol=0, atol=_TOLERANCE[found.dtype.itemsize]):
                raise UserError(f"{WEIGHTS}: tensor {POSITIONS} holds other positions than config.json's")


def _positions(config: DiTConfig) -> Iterator[np.ndarray]:
    """Yield the positions of each row of the largest grid, which SD3 stores."""
    if config.largest_grid is not None:
        columns = position_rows(config, np.arange(config.largest_grid))
        for row in columns:
            yield np.concatenate([columns, np.broadcast_to(row, columns.shape)], axis=1)


def open_transformer(path: str | os.PathLike[str]) -> DiffusersTransformer:
    """Open the directory of a diffusers transformer, and check that its tensors fit its config.

    Raises UserError where there is none, where it is damaged, or of a shape that `DiT` does not have.
    """
    directory = resolve_path(path)
    if not os.path.lexists(directory / CONFIG):
        within = (directory / "model_index.json").exists()
        hint = f"; its transformer is in {directory / 'transformer'}" if within else ""
        raise UserError(f"{directory}: is no model of diffusers: it has no {CONFIG}{hint}")
    with blamed(directory):
        config = transformer_from_diffusers(read_json(directory / CONFIG))
        if not os.path.lexists(directory / WEIGHTS):
            raise UserError(f"has no weights: expected {WEIGHTS}; only safetensors is read, in one file")
        source = DiffusersTransformer(directory, config, SafetensorsTensors(directory, WEIGHTS), _parameters(config))
        source.check()
    return source


def save_transformer(
    directory: str | os.PathLike[str], config: DiTConfig, read: Callable[[str], object], *, dtype: str = "float32"
) -> None:
    """Write a diffusion transformer as diffusers would.

    Args:
        directory: a new one, which appears when everything is in it.
        read: function that returns a whole parameter by its path, an array of NumPy or JAX, its layers in true order.
            Each is asked for once and freed before the next.
        dtype: dtype of the tensors.

    Raises UserError where the directory exists and is not empty, where diffusers has no such model, or a value is not
    finite.
    """
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    text = json.dumps(transformer_to_diffusers(config), indent=2, sort_keys=True)
    parameters = _parameters(config)
    infos = {name: TensorInfo(p.tensor_shape, FLOATS[dtype]) for p in parameters.values() for name in p.names}
    if config.largest_grid is not None:
        infos[POSITIONS] = TensorInfo((1, config.largest_grid**2, config.hidden_size), FLOATS[dtype])

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        for path, parameter in parameters.items():
            value = np.asarray(read(path))
            assert value.shape == parameter.shape, f"{path}: shape {value.shape}, but the model has {parameter.shape}"
            for layer, name in enumerate(parameter.names):
                yield name, parameter.theirs(value[layer] if parameter.stacked else value)
        yield from zip(itertools.repeat(POSITIONS), _positions(config))

    with new_directory(directory, sum(info.nbytes for info in infos.values())) as temporary:
        (temporary / CONFIG).write_text(f"{text}\n", "utf-8")
        with open(temporary / WEIGHTS, "wb") as stream:
            stream.write(safetensors_header(infos))
            for name, value in parts():
                if not np.isfinite(value).all():
                    raise UserError(f"tensor {name} has values that are not finite: nothing is written")
                stream.write(np.ascontiguousarray(cast(value, FLOATS[dtype], name)).reshape(-1).view(np.uint8).data)
