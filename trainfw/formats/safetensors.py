"""Directories of safetensors files, read in parts; everything that they claim is checked.

Format: https://github.com/huggingface/safetensors#format. Eight bytes give the length of the header, and the header
(JSON) the place of every tensor in the rest of the file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from trainfw.errors import UserError, short
from trainfw.formats.tensors import CHUNK, TensorInfo, Tensors
from trainfw.json_text import LIMIT, parse_json, read_json
from trainfw.paths import check_file

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SEPARATE = 32 * 1024
"""Bytes from which a run of values is worth a read of its own; shorter runs are read with the bytes between them."""
_METADATA = "__metadata__"


@dataclass(frozen=True)
class _Place:
    file: Path
    info: TensorInfo
    start: int
    """Byte of the file at which its values begin."""


class SafetensorsTensors(Tensors):
    """The tensors of `single`, or of the shards that `model.safetensors.index.json` names.

    Opening it checks the claims of headers and index against the files' real sizes, before any value is read. A shard's
    name is that of a file in the directory itself, and no path. The file may be a symbolic link to elsewhere, as in
    Hugging Face's cache: links come from the user who made the directory, and not from the contents of files.

    Values are read with `pread` and never mapped, so that the host's memory holds only what was asked for.
    """

    def __init__(self, directory: str | os.PathLike[str], single: str = SINGLE):
        directory = Path(directory)
        whole = single != SINGLE or os.path.lexists(directory / single)
        self.metadata: Mapping[str, str] = {}
        """Texts that the header of a file by itself has."""
        if whole:
            self._places, self.metadata = _read_header(directory / single)
        else:
            self._places = _sharded(directory)
        self.infos: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        place = self._places[name]
        shape, dtype = place.info.shape, place.info.dtype
        bounds = bounds_of(index, shape)
        out = np.empty([stop - start for start, stop in bounds], dtype)
        if out.size:
            descriptor = os.open(place.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            try:
                _fill(out.view(np.uint8) if out.ndim else out, descriptor, place, place.start, shape, bounds)
            finally:
                os.close(descriptor)
        return out


def _sharded(directory: Path) -> dict[str, _Place]:
    """Return the places of the tensors in the shards that the index names."""
    index = directory / INDEX
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: expected weight_map, an object of tensor names and the files that hold them")
    _check_names(index, named)
    for name, shard in named.items():
        if not isinstance(shard, str) or not _SHARD(shard) or not shard.isprintable():
            expected = "the name of a .safetensors file in this directory"
            raise UserError(f"{index}: tensor {name} is said to be in {short(shard)}; expected {expected}")
    places: dict[str, _Place] = {}
    for shard in sorted(set(named.values())):
        file = directory / shard
        if not os.path.lexists(file):
            raise UserError(f"{index}: names shard {shard!r}, which is not there: the download is not complete")
        for name, place in _read_header(file)[0].items():
            if name in places:
                raise UserError(f"{file}: tensor {name} is in {places[name].file.name} too")
            if name not in named:
                raise UserError(f"{file}: holds tensor {name}, which {INDEX} does not name")
            places[name] = place
    for name, shard in named.items():
        if name not in places:
            raise UserError(f"{index}: tensor {name} is not in {shard}, where it should be")
        if places[name].file.name != shard:
            raise UserError(f"{index}: tensor {name} is in {places[name].file.name}, not in {shard}")
    return places


_SHARD = re.compile(r"[^/\\:]{0,243}\.safetensors").fullmatch
MAX_NAME = 500
"""Most letters of a tensor's name."""


def _check_names(file: Path, names: Iterable[str]) -> None:
    """Raise UserError for a name that no message can show."""
    for name in names:
        if len(name) > MAX_NAME or not name.isprintable():
            raise UserError(f"{file}: tensor {short(name)}: expected a name of at most {MAX_NAME} printable letters")


def bounds_of(index: Sequence[slice], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, stop) in every dim; dims beyond the index are whole. Raises IndexError for steps."""
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} slices of an array of {len(shape)} dims")
    bounds = []
    for part, length in zip([*index, *[slice(None)] * (len(shape) - len(index))], shape):
        start, stop, step = part.indices(length)
        if step != 1:
            raise IndexError(f"only steps of 1 are read, not {step}")
        bounds.append((start, max(start, stop)))
    return bounds


def _fill(
    out: np.ndarray, descriptor: int, place: _Place, start: int, shape: Sequence[int], bounds: list[tuple[int, int]]
) -> None:
    """Fill `out` (contiguous, bytes in its last dim) with a part of the array (shape) that begins at byte `start`."""
    itemsize = place.info.dtype.itemsize
    row = math.prod(shape[1:]) * itemsize
    first, last = bounds[0] if bounds else (0, 1)
    if all((0, length) == bound for length, bound in zip(shape[1:], bounds[1:])):
        _read_exactly(out, descriptor, place, start + first * row)
        return
    needed = math.prod(stop - begin for begin, stop in bounds[1:]) * itemsize
    if needed >= _SEPARATE or row > CHUNK:
        for i in range(first, last):
            _fill(out[i - first], descriptor, place, start + i * row, shape[1:], bounds[1:])
        return
    # Many short runs: read whole rows and cut the runs out.
    rest = tuple(slice(*bound) for bound in bounds[1:-1])
    rest += (slice(bounds[-1][0] * itemsize, bounds[-1][1] * itemsize),)
    step = max(CHUNK // row, 1)
    buffer = np.empty((min(step, last - first), *shape[1:-1], shape[-1] * itemsize), np.uint8)
    for i in range(first, last, step):
        rows = buffer[: min(step, last - i)]
        _read_exactly(rows, descriptor, place, start + i * row)
        out[i - first : i - first + len(rows)] = rows[(slice(None), *rest)]


def _read_exactly(out: np.ndarray, descriptor: int, place: _Place, offset: int) -> None:
    view, done = out.reshape(-1).view(np.uint8).data, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + 2**30]], offset + done)
        if count == 0:
            raise UserError(f"{place.file}: ends before byte {offset + len(view):,}: it was cut short while being read")
        done += count


def _read_header(file: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    """Read the place of every tensor, and the metadata. Raises UserError where the header does not fit the file."""
    check_file(file)
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise UserError(f"{file}: is {size} bytes: not a safetensors file, or cut short")
            length = int.from_bytes(stream.read(8), "little")
            says = f"says that its header has {length:,} bytes"
            if length > LIMIT:
                raise UserError(f"{file}: {says}; expected {LIMIT:,} at most")
            if length > size - 8:
                raise UserError(f"{file}: {says}, but the file has {size:,}: cut short?")
            header = parse_json(stream.read(length), f"{file}: header")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{file}: {_METADATA}: expected an object of strings")
    _check_names(file, header)
    places = {name: _place(file, name, entry, 8 + length, size) for name, entry in header.items()}
    end, previous = 8 + length, ""  # tensors fill the file, each byte once: other bytes could be anything
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].info.nbytes)):
        if place.start < end:
            raise UserError(f"{file}: tensors {previous} and {name} overlap")
        if place.start > end:
            raise UserError(f"{file}: {place.start - end:,} bytes before tensor {name} belong to no tensor")
        end, previous = place.start + place.info.nbytes, name
    if end != size:
        raise UserError(f"{file}: {size - end:,} bytes at the end belong to no tensor")
    return places, metadata


def _place(file: Path, name: str, entry: object, data: int, size: int) -> _Place:
    """Check one tensor of a header, in a file of `size` bytes whose values begin at byte `data`. Raises UserError."""
    tensor = f"{file}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{tensor}: expected dtype, shape and data_offsets, found {short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{tensor}: dtype {short(dtype)} is not supported; one of: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_count(length) for length in shape) or len(shape) > 8:
        raise UserError(f"{tensor}: shape {short(shape)}: expected up to 8 lengths of 0 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(offset) for offset in offsets):
        raise UserError(f"{tensor}: data_offsets {short(offsets)}: expected two places in the file")
    begin, end = offsets
    if begin > end or data + end > size:
        raise UserError(
            f"{tensor}: lies at bytes {begin:,} to {end:,} of the {size - data:,} that the file has: cut short?"
        )
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if end - begin != info.nbytes:
        raise UserError(f"{tensor}: has {end - begin:,} bytes, but {dtype} of shape {info.shape} takes {info.nbytes:,}")
    return _Place(file, info, data + begin)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
