"""The tensors of a GGUF file as if they were those of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from trainfw.errors import UserError
from trainfw.formats import Header, StoredTensor, TensorInfo, fingerprint, read_header
from trainfw.interop.gguf.config import architecture_of, gguf_config
from trainfw.interop.gguf.tensor_names import ROPE_FREQS, Row, template, to_halves

CHUNK_BYTES = 8 << 20
"""Dequantised at a time."""
MAX_TENSORS = 1 << 18
"""The largest mixtures of experts have a third of that, and a name costs as much whatever its tensor's size."""

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Of what is stored as it is; everything else is dequantised to float32."""


@dataclass(frozen=True)
class _Place:
    """Where a Hugging Face tensor is in the file."""

    stored: StoredTensor
    row: Row
    first_row: int
    """Rows of the stored tensor before it: those of other experts."""
    heads: int | None
    """How many heads its rows are, where their order within a head is llama.cpp's."""


class GGUFTensors:
    """The tensors of a GGUF file by their Hugging Face names, in that layout, dequantised; nothing is read before it is
    asked for, and then only the rows that are.

    Raises UserError for a file that is damaged, of an architecture that is not supported, with a tensor that its
    architecture does not have, or quantised in a way that the `gguf` library cannot undo.
    """

    def __init__(self, file: Path | str) -> None:
        self.header = read_header(file)
        config = gguf_config(file)
        layers = config["num_hidden_layers"]
        self._heads = {"query": config["num_attention_heads"], "key": config["num_key_value_heads"]}
        experts = config.get("num_experts", config.get("num_local_experts"))
        rows = {row.gguf: row for row in architecture_of(self.header).rows}
        self._places: dict[str, _Place] = {}
        for name, stored in self.header.tensors.items():
            if name == ROPE_FREQS:  # checked with the config
                continue
            pattern, layer = template(name)
            if pattern not in rows or (layer is not None and layer >= layers):
                raise UserError(
                    f"{self.header.file}: architecture {self.header.architecture} of {layers} layers has no tensor "
                    f"{name[:80]!r}"
                )
            self._add(rows[pattern], stored, layer, experts)
        _refuse_unreadable(self.header)
        self.infos: Mapping[str, TensorInfo] = {name: self._info(place) for name, place in self._places.items()}

    def _add(self, row: Row, stored: StoredTensor, layer: int | None, experts: int | None) -> None:
        per_expert = "{expert}" in row.huggingface
        if per_expert and (len(stored.shape) != 3 or stored.shape[0] != experts):
            raise UserError(
                f"{self.header.file}: tensor {stored.name} has shape {stored.shape}: expected ({experts}, ...) "
                "for as many experts"
            )
        if not per_expert and len(stored.shape) > 2:
            raise UserError(f"{self.header.file}: tensor {stored.name} has shape {stored.shape}: expected 2 dims or 1")
        heads = self._heads[row.heads] if row.heads is not None else None
        if heads is not None and (len(stored.shape) != 2 or stored.shape[0] % (2 * heads)):
            raise UserError(
                f"{self.header.file}: tensor {stored.name} has shape {stored.shape}: expected {heads} heads"
            )
        if len(self._places) > MAX_TENSORS:
            raise UserError(f"{self.header.file}: more than {MAX_TENSORS:,} tensors, each expert's by itself")
        for expert in range(stored.shape[0] if per_expert else 1):
            name = row.huggingface.format(layer=layer, expert=expert)
            self._places[name] = _Place(stored, row, expert * stored.shape[1] if per_expert else 0, heads)

    def _info(self, place: _Place) -> TensorInfo:
        shape = place.stored.shape
        dtype = np.dtype(np.float32) if place.row.plus_one else _DTYPES.get(place.stored.type, np.dtype(np.float32))
        return TensorInfo(shape[1:] if len(shape) == 3 else shape, dtype.newbyteorder("="))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """That part of a tensor, freshly allocated. Rows are read and dequantised in chunks of about `CHUNK_BYTES`."""
        info, place = self.infos[name], self._places[name]
        whole = tuple(slice(0, length) for length in info.shape)
        ranges = [
            range(*part.indices(length))
            for part, length in zip((*index, *whole[len(index) :]), info.shape, strict=True)
        ]
        if any(part.step != 1 for part in ranges):
            raise ValueError(f"{name}: index {index}: expected steps of 1")
        columns = slice(ranges[-1].start, ranges[-1].stop)
        rows = ranges[0] if len(ranges) == 2 else range(1)
        out = np.empty((len(rows), len(ranges[-1])), info.dtype)
        # Whole heads at a time where their rows change places.
        group = 1 if place.heads is None else info.shape[0] // place.heads
        step = max(CHUNK_BYTES // (4 * info.shape[-1] * group), 1) * group
        first = rows.start // group * group
        for start in range(first, rows.stop, step) if out.size else ():
            stop = min(start + step, -(-rows.stop // group) * group)
            values = self._rows(place, start, stop)
            if place.heads is not None:
                values = to_halves(values, (stop - start) // group)
            kept = slice(max(start, rows.start), min(stop, rows.stop))
            part = values[kept.start - start : kept.stop - start, columns]
            out[kept.start - rows.start : kept.stop - rows.start] = part - np.float32(1) if place.row.plus_one else part
        return out if len(info.shape) == 2 else out[0]

    def _rows(self, place: _Place, start: int, stop: int) -> np.ndarray:
        """Rows as they are stored, dequantised."""
        from gguf import GGMLQuantizationType, quants

        stored = place.stored
        row_bytes = stored.nbytes * stored.shape[-1] // _size(stored.shape)
        offset = stored.offset + (place.first_row + start) * row_bytes
        count = (stop - start) * row_bytes
        data = np.fromfile(stored.file, np.uint8, count, offset=offset)
        if data.size != count:
            raise UserError(f"{stored.file}: became shorter while it was read")
        if stored.type in _DTYPES:
            return data.view(_DTYPES[stored.type]).reshape(stop - start, -1)
        return quants.dequantize(data.reshape(stop - start, row_bytes), GGMLQuantizationType[stored.type])

    def fingerprint(self) -> str:
        """Identity of the weights: names, shapes, dtypes and sampled values of every tensor."""
        return fingerprint(self)


def _refuse_unreadable(header: Header) -> None:
    """Raise UserError where a tensor is of a type that the `gguf` library does not dequantise."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    types = {stored.type: stored.name for stored in header.tensors.values() if stored.type not in _DTYPES}
    for kind, name in types.items():
        number = GGMLQuantizationType[kind]
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
        except NotImplementedError as error:
            raise UserError(f"{header.file}: tensor {name} has type {kind}, which cannot be dequantised") from error


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
