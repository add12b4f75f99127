"""One model in a diffusers directory: config.json and one file of safetensors."""

from __future__ import annotations

import abc
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from trainfw.errors import UserError
from trainfw.formats import FLOATS, SafetensorsTensors, TensorInfo, cast
from trainfw.interop.paths import CONFIG, blamed
from trainfw.interop.saving import new_directory, safetensors_header
from trainfw.models import FamilyConfig
from trainfw.paths import resolve_path

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Component(abc.ABC):
    """A model of a diffusers directory. Opening it reads its config and its header."""

    path: Path
    tensors: SafetensorsTensors
    config: FamilyConfig

    @abc.abstractmethod
    def array(self, path: str, dtype: str = "float32", layer_order: Sequence[int] | None = None) -> np.ndarray:
        """Read one of our parameters, such as `layers.attention.query.kernel`.

        Args:
            layer_order: the layer at each place of a stacked dim; by default their true order.

        Raises UserError where the model has no such parameter.
        """

    @property
    def dtype(self) -> str:
        """Dtype of the first tensor, as which all are stored."""
        return str(next(iter(self.tensors.infos.values())).dtype)

    def fingerprint(self) -> str:
        return self.tensors.fingerprint()

    def read(
        self, path: str, like: jax.ShapeDtypeStruct | jax.Array, layer_order: Sequence[int] | None = None
    ) -> jax.Array:
        """Read one of our parameters in the dtype and sharding of `like`; the host holds one at a time.

        Raises UserError where it has another shape.
        """
        values = self.array(path, str(like.dtype), layer_order)
        if values.shape != tuple(like.shape):
            raise UserError(f"{self.path}: {path} has shape {values.shape}; expected {tuple(like.shape)}")
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


@contextlib.contextmanager
def opening(path: str | os.PathLike[str], kind: str, part: str) -> Iterator[Path]:
    """Open the directory of a component, which errors inside are about; a `kind` lies in `part` of a pipeline.

    Raises UserError where there is no model, or one without weights.
    """
    directory = resolve_path(path)
    if not os.path.lexists(directory / CONFIG):
        hint = f"; its {kind} is in {directory / part}" if (directory / "model_index.json").exists() else ""
        raise UserError(f"{directory}: is no model of diffusers: it has no {CONFIG}{hint}")
    with blamed(directory):
        yield directory


def open_tensors(directory: Path) -> SafetensorsTensors:
    """Open a component's tensors. Raises UserError where there are none."""
    if not os.path.lexists(directory / WEIGHTS):
        raise UserError(f"has no weights: expected {WEIGHTS}; only safetensors is read, in one file")
    return SafetensorsTensors(directory, WEIGHTS)


def check_tensors(infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError, with the tensor's name, where a file has other tensors than these, or of other shapes."""
    for name, shape in shapes.items():
        if name not in infos:
            raise UserError(f"{WEIGHTS}: no tensor {name}")
        if infos[name].shape != shape:
            raise UserError(f"{WEIGHTS}: tensor {name} has shape {infos[name].shape}, but the model needs {shape}")
    if extra := sorted(set(infos) - set(shapes)):
        raise UserError(f"{WEIGHTS}: the model has no place for tensor {extra[0][:200]}")


def write_component(
    directory: str | os.PathLike[str],
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[tuple[str, np.ndarray]],
    dtype: str,
) -> None:
    """Write a component, in a new directory that appears when everything is in it.

    Args:
        config: config.json.
        shapes: shape of each tensor.
        values: the tensors, in the order of `shapes`; each is freed before the next.
        dtype: dtype of the tensors.

    Raises UserError where the directory exists and is not empty, or a value is not finite.
    """
    if dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    infos = {name: TensorInfo(shape, FLOATS[dtype]) for name, shape in shapes.items()}
    with new_directory(directory, sum(info.nbytes for info in infos.values())) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        with open(temporary / WEIGHTS, "wb") as stream:
            stream.write(safetensors_header(infos))
            for name, value in values:
                if not np.isfinite(value).all():
                    raise UserError(f"tensor {name} has values that are not finite: nothing is written")
                stream.write(np.ascontiguousarray(cast(value, FLOATS[dtype], name)).reshape(-1).view(np.uint8).data)
