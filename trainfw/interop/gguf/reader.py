"""Reader of a GGUF file's tensors by the names, and in the layout, of a Hugging Face checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from trainfw.errors import UserError
from trainfw.formats import StoredTensor, TensorInfo, Tensors, bounds_of, read_header
from trainfw.interop.gguf.config import architecture_of, gguf_config
from trainfw.interop.gguf.tensor_names import ROPE_FREQS, Row, rows_of, template, to_halves

CHUNK_BYTES = 8 << 20
"""Bytes dequantised at a time."""
MAX_TENSORS = 1 << 18
"""Most tensors, each expert's counted by itself: the largest mixtures of experts have a third of that."""

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Dtypes of formats that are read as they are; all others are dequantised to float32."""


@dataclass(frozen=True)
class _Place:
    """The place of a Hugging Face tensor in the file."""

    stored: StoredTensor
    row: Row
    first_row: int
    """Number of rows of the stored tensor before it: those of other experts."""
    heads: int | None
    """Number of heads that its rows make up, where they are in llama.cpp's order; else None."""


class GGUFTensors(Tensors):
    """The tensors of a GGUF file by their Hugging Face names, in that layout, dequantised. Only rows that are asked for
    are read.

    Raises UserError for a file that is damaged, of an architecture that is not supported, with a tensor that its
    architecture does not have, or with a quantisation that the `gguf` library cannot undo.
    """

    def __init__(self, file: Path | str) -> None:
        self.header = read_header(file)
        config = gguf_config(file)
        layers = config["num_hidden_layers"]
        self._heads = {"query": config["num_attention_heads"], "key": config["num_key_value_heads"]}
        experts = config.get("num_experts", config.get("num_local_experts"))
        name = self.header.architecture
        rows = {row.gguf: row for family in architecture_of(self.header).families for row in rows_of(name, family)}
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
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        types = {stored.type: stored.name for stored in self.header.tensors.values() if stored.type not in _DTYPES}
        for kind, name in types.items():
            number = GGMLQuantizationType[kind]
            try:
                quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
            except NotImplementedError as error:
                problem = f"tensor {name} has type {kind}, which cannot be dequantised"
                raise UserError(f"{self.header.file}: {problem}") from error
        self.infos: Mapping[str, TensorInfo] = {}
        for name, place in self._places.items():
            shape, kind = place.stored.shape, "F32" if place.row.plus_one else place.stored.type
            dtype = _DTYPES.get(kind, _DTYPES["F32"]).newbyteorder("=")
            self.infos[name] = TensorInfo(shape[1:] if len(shape) == 3 else shape, dtype)

    def _add(self, row: Row, stored: StoredTensor, layer: int | None, experts: int | None) -> None:
        per_expert = "{expert}" in row.huggingface
        has = f"{self.header.file}: tensor {stored.name} has shape {stored.shape}"
        if per_expert and (len(stored.shape) != 3 or stored.shape[0] != experts):
            raise UserError(f"{has}: expected ({experts}, ...) for as many experts")
        if not per_expert and len(stored.shape) > 2:
            raise UserError(f"{has}: expected 2 dims or 1")
        heads = self._heads[row.heads] if row.heads is not None else None
        if heads is not None and (len(stored.shape) != 2 or stored.shape[0] % (2 * heads)):
            raise UserError(f"{has}: expected {heads} heads")
        if len(self._places) > MAX_TENSORS:
            raise UserError(f"{self.header.file}: more than {MAX_TENSORS:,} tensors, each expert's by itself")
        for expert in range(stored.shape[0] if per_expert else 1):
            name = row.huggingface.format(layer=layer, expert=expert)
            self._places[name] = _Place(stored, row, expert * stored.shape[1] if per_expert else 0, heads)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        info, place = self.infos[name], self._places[name]
        bounds = bounds_of(index, info.shape)
        columns = slice(*bounds[-1])
        rows = range(*bounds[0]) if len(bounds) == 2 else range(1)
        out = np.empty((len(rows), columns.stop - columns.start), info.dtype)
        # Whole heads at a time where their rows change places.
        group = 1 if place.heads is None else info.shape[0] // place.heads
        step = max(CHUNK_BYTES // (4 * info.shape[-1] * group), 1) * group
        first = rows.start // group * group
        for start in range(first, rows.stop, step) if out.size else ():
            stop = min(start + step, -(-rows.stop // group) * group)
            values = self._rows(place, start, stop)
            if place.heads is not None:
                values = to_halves(values, (stop - start) // group)
            lower, upper = max(start, rows.start), min(stop, rows.stop)
            part = values[lower - start : upper - start, columns]
            out[lower - rows.start : upper - rows.start] = part - np.float32(1) if place.row.plus_one else part
        return out if len(info.shape) == 2 else out[0]

    def _rows(self, place: _Place, start: int, stop: int) -> np.ndarray:
        """Read rows in the order in which they are stored, and dequantise them."""
        from gguf import GGMLQuantizationType, quants

        stored = place.stored
        row_bytes = stored.nbytes * stored.shape[-1] // math.prod(stored.shape)
        offset = stored.offset + (place.first_row + start) * row_bytes
        count = (stop - start) * row_bytes
        data = np.fromfile(stored.file, np.uint8, count, offset=offset)
        if data.size != count:
            raise UserError(f"{stored.file}: became shorter while it was read")
        if stored.type in _DTYPES:
            return data.view(_DTYPES[stored.type]).reshape(stop - start, -1)
        return quants.dequantize(data.reshape(stop - start, row_bytes), GGMLQuantizationType[stored.type])
