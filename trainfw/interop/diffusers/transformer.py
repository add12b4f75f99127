"""Diffusion transformers of diffusers' directories, both ways: config.json and one file of safetensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainfw.errors import UserError, did_you_mean
from trainfw.formats import FLOATS, cast
from trainfw.interop.diffusers.component import (
    WEIGHTS,
    Component,
    check_tensors,
    open_tensors,
    opening,
    write_component,
)
from trainfw.interop.diffusers.names import NAMES, POSITIONS, Form
from trainfw.interop.diffusers.transformer_config import CLASSES, transformer_from_diffusers, transformer_to_diffusers
from trainfw.interop.mapping import parameter_shapes
from trainfw.interop.paths import CONFIG
from trainfw.json_text import read_json
from trainfw.models import DiTConfig, position_rows

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
    rows = {row.path: row for row in NAMES[CLASSES[config.conditioning]]}
    found = {}
    for path, shape in parameter_shapes(config).items():
        row, stacked = rows[path], path.startswith("layers.")
        count = shape[0] if stacked else config.num_layers
        names = dict.fromkeys(row.tensor.format(layer=layer, last=config.num_layers - 1) for layer in range(count))
        found[path] = _Parameter(row.form, shape, tuple(names), stacked, config.patch_size)
    return found


@dataclass(frozen=True)
class DiffusersTransformer(Component):
    """A diffusion transformer of a diffusers directory."""

    config: DiTConfig
    parameters: Mapping[str, _Parameter]

    def array(self, path: str, dtype: str = "float32", layer_order: Sequence[int] | None = None) -> np.ndarray:
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

    def check(self) -> None:
        """Compare names and shapes of the tensors with the config, and copies of a tensor with one another.

        Raises UserError, with the tensor's name, where they do not fit.
        """
        shapes = {name: p.tensor_shape for p in self.parameters.values() for name in p.names}
        if self.config.largest_grid is not None:
            shapes[POSITIONS] = (1, self.config.largest_grid**2, self.config.hidden_size)
        check_tensors(self.tensors.infos, shapes)
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
    with opening(path, "transformer", "transformer") as directory:
        config = transformer_from_diffusers(read_json(directory / CONFIG))
        source = DiffusersTransformer(directory, open_tensors(directory), config, _parameters(config))
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
    fields, parameters = transformer_to_diffusers(config), _parameters(config)
    shapes = {name: p.tensor_shape for p in parameters.values() for name in p.names}
    if config.largest_grid is not None:
        shapes[POSITIONS] = (1, config.largest_grid**2, config.hidden_size)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for path, parameter in parameters.items():
            value = np.asarray(read(path))
            assert value.shape == parameter.shape, f"{path}: shape {value.shape}, but the model has {parameter.shape}"
            for layer, name in enumerate(parameter.names):
                yield name, parameter.theirs(value[layer] if parameter.stacked else value)
        yield from zip(itertools.repeat(POSITIONS), _positions(config))

    write_component(directory, fields, shapes, values(), dtype)
