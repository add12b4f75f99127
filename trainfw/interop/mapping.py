"""Conversion between a checkpoint's tensors and our stacked parameters, by the tables of the families."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx

from trainfw.formats import TensorInfo, Tensors, bounds_of, cast, row_blocks
from trainfw.interop.families import FAMILIES, Row
from trainfw.models import FamilyConfig, ModelConfig, abstract_model

_TILE = 64 * 1024
"""Bytes cast and transposed at a time: they fit into a core's nearest caches."""


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensors that it is stacked of."""

    row: Row
    shape: tuple[int, ...]
    """Shape of the parameter, such as (L, E, in, out)."""
    stacked: int
    """Number of its first dims that count tensors: layers, experts."""

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[self.stacked :]
        return shape[::-1] if self.row.transpose else shape

    def name(self, place: Sequence[int]) -> str:
        """Return the name of the tensor at a place of the stacked dims: (layer,) or (layer, expert)."""
        return self.row.tensor.format(**dict(zip(("layer", "expert"), place)))

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield (place, name) of each tensor."""
        for place in itertools.product(*map(range, self.shape[: self.stacked])):
            yield place, self.name(place)

    def read(
        self, tensors: Tensors, index: tuple[slice, ...], dtype: np.dtype, layer_order: Sequence[int] | None = None
    ) -> np.ndarray:
        """Read a part of the parameter from those parts of its tensors, a few megabytes at a time.

        Args:
            layer_order: the layer at each place of the first dim; by default their true order.
        """
        bounds = bounds_of(index, self.shape)
        out = np.empty([stop - start for start, stop in bounds], dtype)
        within = bounds[self.stacked :][:: -1 if self.row.transpose else 1]
        sizes = tuple(stop - start for start, stop in within)
        for place in itertools.product(*(range(*bound) for bound in bounds[: self.stacked])):
            target = out[tuple(i - start for i, (start, _) in zip(place, bounds))]
            target = target.T if self.row.transpose else target
            layer = place if layer_order is None or not place else (layer_order[place[0]], *place[1:])
            name = self.name(layer)
            for block in row_blocks(sizes, tensors.infos[name].dtype.itemsize):
                source = tuple(slice(b.start + start, b.stop + start) for b, (start, _) in zip(block, within))
                values, part = tensors.read(name, source), target[block]
                for tile in row_blocks(values.shape, values.itemsize, _TILE):
                    part[tile] = cast(values[tile], dtype, name)
        return out


@functools.lru_cache(maxsize=8)
def parameters(config: ModelConfig, model_type: str) -> Mapping[str, Parameter]:
    """Return every parameter of the model by path, such as `layers.attention.query.kernel`."""
    rows = {row.path: row for row in FAMILIES[model_type].rows}
    return {
        path: Parameter(rows[path], shape, rows[path].tensor.count("{"))
        for path, shape in parameter_shapes(config).items()
    }


def parameter_shapes(config: FamilyConfig) -> dict[str, tuple[int, ...]]:
    flat = nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))
    return {".".join(map(str, path)): tuple(param.shape) for path, param in flat}


class ParameterTensors(Tensors):
    """Our parameters as the tensors of a Hugging Face checkpoint.

    Tensors are in the order of our parameters: read in this order, one parameter is on the host at a time.

    Args:
        read: function that returns a whole parameter by its path, an array of NumPy or JAX of any dtype, its layers in
            their true order.
        dtype: dtype of the tensors.
    """

    def __init__(self, config: ModelConfig, model_type: str, read: Callable[[str], object], dtype: np.dtype):
        self._parameters = parameters(config, model_type)
        self._read, self._dtype = read, dtype
        self._held: tuple[str, np.ndarray] | None = None
        self._places = {
            name: (path, place) for path, parameter in self._parameters.items() for place, name in parameter.names()
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(self._parameters[path].tensor_shape, dtype) for name, (path, _) in self._places.items()
        }

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        path, place = self._places[name]
        tensor = self._parameter(path)[place]
        tensor = tensor.T if self._parameters[path].row.transpose else tensor
        part = tensor[tuple(slice(*bound) for bound in bounds_of(index, tensor.shape))]
        return np.array(cast(part, self._dtype, name), order="C")

    def _parameter(self, path: str) -> np.ndarray:
        if self._held is None or self._held[0] != path:
            self._held = None  # freed before the next is read
            value, shape = np.asarray(self._read(path)), self._parameters[path].shape
            assert value.shape == shape, f"{path}: shape {value.shape}, but the model has {shape}"
            self._held = path, value
        return self._held[1]
