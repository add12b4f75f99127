"""Header of a GGUF file: its metadata and the places of its tensors.

The `gguf` library's own reader trusts the file, so that only the format's types are taken from it. This one compares
every length with the size of the file before anything is allocated.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from trainfw.errors import UserError, expect, one_of, pip_install, short
from trainfw.paths import check_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Versions that are read. Version 1 counted in 32 bits, and was soon given up."""
MAX_HEADER, MAX_STRING, MAX_ELEMENTS = 1 << 25, 1 << 20, 1 << 20
"""Most bytes of the header and of a string, and most elements of an array: the largest vocabularies take a third of
that, and a false header allocates no more."""
LARGEST_INT, LARGEST = 2**31 - 1, 1e30
"""Largest size, and largest other number, that can be computed with."""
MAX_DIMS = 4
"""Most dims of a tensor in ggml."""

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's codes of the types of metadata, by their numbers."""

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Lengths in row-major order, as in NumPy (the file has the other order). Blocks run along the last dim."""
    type: str
    """ggml's name of the number format, for example `Q4_1`."""
    offset: int
    """Bytes from the start of the file."""
    nbytes: int
    file: Path = Path()
    """The file, one of several parts where llama.cpp's gguf-split cut it."""


@dataclass(frozen=True)
class Header:
    """A GGUF file's metadata and tensors by name; every tensor lies within the file."""

    file: Path
    metadata: Mapping[str, Any]
    """Values by key: int, float, bool, str, or a list of one of these."""
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """Name of the model family in llama.cpp, with which the keys about the model begin."""
        return self.get("general.architecture", str)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of `key`; a float may be written as an int.

        Raises UserError where it is absent and there is no default, is of another kind, or too large to compute with.
        """
        value: Any = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.file}: no metadata key {key}")
        if kind is float and type(value) is int:
            value = float(value)
        fits = type(value) is kind and (not isinstance(value, float) or abs(value) <= LARGEST)
        expect(f"{self.file}: {key}", value, fits, _KINDS[kind])
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1. Raises UserError as `get` does."""
        value = self.get(key, int, default)
        if not 1 <= value <= LARGEST_INT:
            raise UserError(f"{self.file}: {key} = {value}: expected 1 or more, below 2**31")
        return value

    def items(self, key: str, kind: type[T]) -> list[T]:
        """Return a list of values of one kind. Raises UserError as `get` does."""
        values: list[Any] = self.get(key, list)
        for value in values:
            if type(value) is not kind:
                raise UserError(f"{self.file}: {key} holds {short(value)}: expected {_KINDS[kind]} in every place")
        return values


_KINDS: dict[type, str] = {
    int: "a whole number",
    float: f"a number to {LARGEST:g}",
    bool: "true or false",
    str: "text",
    list: "a list",
}


def read_header(file: Path | str) -> Header:
    """Read and check the header of a GGUF file, or of all parts of a split one, given any part; read no tensor.

    Raises UserError for a file that is cut short, of another format, version or byte order, or whose counts, lengths or
    offsets do not fit it, for missing parts, and where the `gguf` library is not installed.
    """
    header = _read_part(Path(os.path.expanduser(file)), named=True)
    count = header.get("split.count", int, 0)
    return _joined(header, count) if count > 1 else header


def _read_part(file: Path, *, named: bool = False) -> Header:
    check_file(file, named=named)
    with file.open("rb") as stream:
        return _Walk(file, stream).header()


def _joined(part: Header, count: int) -> Header:
    """Join the headers of all parts: the first has the metadata, each has tensors. Raises UserError for gaps."""
    name = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", part.file.name)
    if name is None or int(name[3]) != count:
        names = f"NAME-00001-of-{count:05}.gguf and so on"
        raise UserError(f"{part.file}: is one of {count} parts, which are found by their names; expected {names}")
    files = [part.file.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    if missing := [file.name for file in files if not os.path.lexists(file)]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{part.file}: is one of {count} parts; not beside it: {', '.join(missing[:3])}{more}")
    tensors: dict[str, StoredTensor] = {}
    parts = [_read_part(file, named=file == part.file) for file in files]
    for number, each in enumerate(parts):
        place, expected = (each.get("split.no", int, -1), each.get("split.count", int, -1)), (number, count)
        if place != expected:
            raise UserError(f"{each.file}: split.no and split.count = {place}: expected {expected}, as its name says")
        if twice := tensors.keys() & each.tensors.keys():
            raise UserError(f"{each.file}: tensor {short(min(twice))} is in {tensors[min(twice)].file.name} too")
        tensors |= each.tensors
    if (total := parts[0].get("split.tensors.count", int, len(tensors))) != len(tensors):
        raise UserError(f"{files[0]}: its {count} parts have {len(tensors)} tensors, and {total} are expected")
    return Header(files[0], parts[0].metadata, tensors)


class _Walk:
    """A position in the header, with reads that stay inside the file."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.size, self.at = file, os.fstat(stream.fileno()).st_size, 0
        self.data = stream.read(MAX_HEADER)

    def fail(self, problem: str) -> UserError:
        return UserError(f"{self.file}: {problem} (at byte {self.at} of {self.size})")

    def read(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"the header is cut short: {count} bytes were to follow")
        if self.at + count > MAX_HEADER:
            raise self.fail(f"the header goes on past {MAX_HEADER:,} bytes: no model has so many keys and tensors")
        data = self.data[self.at : self.at + count]
        if len(data) != count:
            raise self.fail("the file became shorter while it was read")
        self.at += count
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.read(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = int.from_bytes(self.read(8), "little")
        if length > MAX_STRING:
            raise self.fail(f"text of {length} bytes: expected {MAX_STRING} at most")
        try:
            return self.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"text that is not UTF-8: {error.reason}") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f"metadata of unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind != _STRING and kind not in _SCALARS:
            raise self.fail(f"a list of metadata of type {kind}: expected numbers or text")
        if count > MAX_ELEMENTS:
            raise self.fail(f"a list of {count} elements: expected {MAX_ELEMENTS} at most")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{code}", self.read(count * struct.calcsize(f"<{code}"))))

    def header(self) -> Header:
        if (magic := self.read(4)) != MAGIC:
            raise UserError(f"{self.file}: not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}")
        version = self.scalar("I")
        if version & 0xFFFF == 0 and version >> 16:
            raise UserError(f"{self.file}: a big-endian GGUF file is not supported; convert it where it was made")
        if version not in VERSIONS:
            raise UserError(f"{self.file}: GGUF version {version} is not supported; one of: 2, 3")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        # Each tensor and each key takes so many bytes or more: false counts are found before the loop.
        if num_tensors * 32 + num_keys * 13 > self.size:
            raise self.fail(f"{num_tensors} tensors and {num_keys} metadata keys do not fit into the file")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if not key.isprintable():
                raise self.fail(f"metadata key {short(key)}: expected printable letters")
            if key in metadata:
                raise self.fail(f"metadata key {short(key)} comes twice")
            metadata[key] = self.value(self.scalar("I"))
        infos = []  # name, shape, number of the type, offset from the start of the data
        for _ in range(num_tensors):
            name, rank = self.string(), self.scalar("I")
            if not 1 <= rank <= MAX_DIMS:
                raise self.fail(f"tensor {short(name)} has {rank} dims: expected 1 to {MAX_DIMS}")
            shape = tuple(reversed([self.scalar("Q") for _ in range(rank)]))
            infos.append((name, shape, self.scalar("I"), self.scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        fits = type(alignment) is int and 1 <= alignment <= 1 << 20 and not alignment & (alignment - 1)
        expect(f"{self.file}: general.alignment", alignment, fits, "a power of two")
        start = -(-self.at // alignment) * alignment
        return Header(self.file, metadata, self.placed(infos, start, alignment))

    def placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        """Return the tensors by name. Raises UserError where one reaches beyond the file or into another."""
        sizes = {int(kind): (kind.name, *each) for kind, each in gguf_library().GGML_QUANT_SIZES.items()}
        tensors: dict[str, StoredTensor] = {}
        for name, shape, number, offset in infos:
            if number not in sizes:
                raise UserError(f"{self.file}: tensor {short(name)} has unknown type {number}")
            kind, block, bytes_per_block = sizes[number]
            if min(shape) < 1 or shape[-1] % block:
                raise UserError(f"{self.file}: tensor {short(name)} of type {kind} has shape {shape}")
            nbytes = math.prod(shape) // block * bytes_per_block
            if offset % alignment or start + offset + nbytes > self.size:
                raise UserError(
                    f"{self.file}: tensor {short(name)}: {nbytes} bytes at {start + offset} of a file of {self.size}: "
                    "the file is cut short, or its header is wrong"
                )
            if name in tensors:
                raise UserError(f"{self.file}: tensor {short(name)} comes twice")
            tensors[name] = StoredTensor(name, shape, kind, start + offset, nbytes, self.file)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for left, right in itertools.pairwise(ordered):
            if left.offset + left.nbytes > right.offset:
                raise UserError(f"{self.file}: tensors {short(left.name)} and {short(right.name)} overlap")
        return tensors


def gguf_library() -> Any:
    """Import the `gguf` library. Raises UserError, with how to install it, where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"GGUF files need the gguf library: {pip_install('gguf')}") from error
    return gguf


def known_or_refuse(header: Header, key: str, choices: Mapping[str, T]) -> T:
    """Return the one of `choices` that a text key names. Raises UserError with the choices."""
    name = header.get(key, str)
    if name not in choices:
        raise UserError(f"{header.file}: {key} = {short(name)} is not supported{one_of(name, choices)}")
    return choices[name]
