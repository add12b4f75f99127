"""What every checkpoint format is read as and written from: tensors by their Hugging Face names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from trainfw.errors import UserError

CHUNK = 8 * 2**20
"""Bytes read, cast and written at a time: what a tensor costs on the host beyond where it goes."""

FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes that weights have, by the names that config.json and recipes give them."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Of what `read` returns; `ml_dtypes.bfloat16` for BF16."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint's tensors by their Hugging Face names; nothing is read before it is asked for."""

    infos: Mapping[str, TensorInfo]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """That part of a tensor, in the dtype of its info and freshly allocated; dims beyond the index whole.

        Memory and reading are of about the part's size.
        """
        ...

    def fingerprint(self) -> str:
        """Identity of the weights: names, shapes, dtypes and sampled values of every tensor."""
        ...


def fingerprint(tensors: Tensors, samples: int = 4, width: int = 64) -> str:
    """The identity of a checkpoint's weights: names, shapes, dtypes, and of every tensor `samples` pieces of `width`
    values, spread evenly. The same however the tensors are cut into files.

    Sampled, because hashing a large model costs as much as loading it: training changes every tensor all over, and is
    seen; a change of a few values by hand may not be.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors.infos):
        info = tensors.infos[name]
        digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
        if not info.size:
            continue
        for sample in range(samples):
            index = []
            for length in info.shape[:-1]:
                at = sample * (length - 1) // max(samples - 1, 1)
                index.append(slice(at, at + 1))
            if info.shape:
                last = info.shape[-1]
                start = sample * max(last - width, 0) // max(samples - 1, 1)
                index.append(slice(start, min(start + width, last)))
            digest.update(tensors.read(name, tuple(index)).tobytes())
    return digest.hexdigest()


def chunks(tensors: Tensors, name: str, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
    """A tensor's values in row-major order, in pieces of about `CHUNK` bytes, cast to `dtype` where given."""
    info = tensors.infos[name]
    for index in row_blocks(info.shape, info.dtype.itemsize):
        part = tensors.read(name, index)
        yield part if dtype is None else cast(part, dtype, name)


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """In another float dtype. Raises UserError where a finite value would become infinite, naming the tensor."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(values.dtype).max:
        lost = np.isinf(result) & np.isfinite(values)
        if lost.any():
            value = float(values[lost].flat[0])
            raise UserError(f"tensor {name} holds {value:g}, which {dtype} cannot; choose bfloat16 or float32")
    return result


def row_blocks(shape: tuple[int, ...], itemsize: int, limit: int = CHUNK) -> Iterable[tuple[slice, ...]]:
    """Indices that cut an array into contiguous blocks of at most `limit` bytes (one element at least), in order."""
    if math.prod(shape) * itemsize <= limit or not shape:
        yield tuple(slice(0, length) for length in shape)
        return
    row = math.prod(shape[1:]) * itemsize
    if row > limit:
        for i in range(shape[0]):
            for rest in row_blocks(shape[1:], itemsize, limit):
                yield (slice(i, i + 1), *rest)
        return
    step = max(limit // row, 1)
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])), *(slice(0, length) for length in shape[1:]))
