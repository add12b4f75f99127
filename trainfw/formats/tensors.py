"""Tensors by their Hugging Face names: the form in which every checkpoint format is read and written."""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from trainfw.errors import UserError

CHUNK = 8 * 2**20
"""Bytes read, cast and written at a time: the host memory that a tensor takes besides its destination."""

FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Dtypes of weights, by their names in config.json and recipes."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Dtype of the arrays that `read` returns; `ml_dtypes.bfloat16` for BF16."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Tensors(abc.ABC):
    """A checkpoint's tensors by their Hugging Face names; nothing is read before it is asked for."""

    infos: Mapping[str, TensorInfo]

    @abc.abstractmethod
    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a part of a tensor into a new array of its info's dtype; dims beyond the index are whole.

        Memory and time are about those of the part alone. Slices have no steps.
        """

    def fingerprint(self, samples: int = 4, width: int = 64) -> str:
        """Return a hash of all tensors' names, shapes and dtypes, and of `samples` pieces of `width` values of each.

        It does not depend on how the tensors are cut into files. The values are sampled because hashing a large model
        takes as long as loading it: training changes every tensor all over, which is seen; a change of a few values by
        hand may not be.
        """
        digest = hashlib.sha256()
        for name, info in sorted(self.infos.items()):
            digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
            for sample in range(samples if info.size else 0):
                index = []
                for length, part in zip(info.shape, (*(1,) * (len(info.shape) - 1), width)):
                    start = sample * max(length - part, 0) // max(samples - 1, 1)
                    index.append(slice(start, min(start + part, length)))
                digest.update(self.read(name, tuple(index)).tobytes())
        return digest.hexdigest()


def chunks(tensors: Tensors, name: str, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
    """Yield a tensor's values in row-major order, in pieces of about `CHUNK` bytes, cast to `dtype` if given."""
    info = tensors.infos[name]
    for index in row_blocks(info.shape, info.dtype.itemsize):
        part = tensors.read(name, index)
        yield part if dtype is None else cast(part, dtype, name)


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Convert values to another float dtype. Raises UserError, with the tensor's name, for a value beyond its range."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(values.dtype).max
    if narrower and (lost := np.isinf(result) & np.isfinite(values)).any():
        value = float(values[lost].flat[0])
        raise UserError(f"tensor {name} holds {value:g}, which {dtype} cannot; choose bfloat16 or float32")
    return result


def row_blocks(shape: tuple[int, ...], itemsize: int, limit: int = CHUNK) -> Iterable[tuple[slice, ...]]:
    """Yield indices that cut an array into contiguous blocks of `limit` bytes or fewer (one element at least)."""
    if math.prod(shape) * itemsize <= limit or not shape:
        yield tuple(slice(0, length) for length in shape)
        return
    step = max(limit // (math.prod(shape[1:]) * itemsize), 1)
    for start in range(0, shape[0], step):
        for rest in row_blocks(shape[1:], itemsize, limit):  # one, unless a row is longer than `limit`
            yield (slice(start, min(start + step, shape[0])), *rest)
