"""Sources of pictures: files in folders, with captions beside them, named by JSONL, or held by Parquet and tars."""

from __future__ import annotations

import functools
import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainfw.data.arrow import SAVED, ReadTables, parquet_tables, saved_dataset_tables
from trainfw.data.compressed import File, open_plain
from trainfw.data.config import PICTURES, DataConfig
from trainfw.data.files import Finder, Input, file_kind
from trainfw.data.readers import Columns, Reader, Unreadable, check_column, read_jsonl_values
from trainfw.data.remote import is_remote
from trainfw.data.sources import Row, Source
from trainfw.errors import UserError
from trainfw.json_text import parse_json
from trainfw.paths import outside
from trainfw.utf8 import decode_utf8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
LISTS = (".jsonl", ".ndjson")
MEMBER = 2**26
"""Most bytes of a caption's file, or of a tar's member."""
_HEADER = 2**20
"""Most bytes of a tar's header of long names."""
_TABLE_ROWS = 64
"""Rows of a table in memory at once: pictures are large."""

Encoded = bytes | Path | np.ndarray
"""The bytes of a picture's file, the path of the file, or pixels, uint8 (H, W)."""


class Picture(NamedTuple):
    """One picture of a source, not decoded yet, with the class and the caption that it was found with."""

    data: Encoded
    label: object = None
    caption: object = None
    kin: Encoded | None = None
    """Picture that decides the split in its place."""


@dataclass(frozen=True)
class PictureSource(Source):
    """Pictures in a fixed order, from a list of inputs."""

    leftover: tuple[Input, ...] = ()
    """Pictures below a list or a table of pictures, which are to be named by it."""
    credit: str = ""
    """Line that names the pictures' authors."""

    def rows(self) -> Iterator[Row]:
        """Yield every picture, or `Unreadable`, in order. Raises UserError where an input cannot be read."""
        named: set[str] = set()
        for id_, value in self._read():
            if self.leftover and isinstance(value, Picture) and isinstance(value.data, Path):
                named.add(os.path.realpath(value.data))
            yield Row(id_, value)
        for item in self.leftover:
            if os.path.realpath(item.local) not in named:
                yield Row(item.name, Unreadable("not named by the list or table of pictures above it"))

    def fingerprint(self) -> str:
        """Return a hash that changes with the inputs, and with the size or time of a picture that a list names."""
        state = [Source(self.inputs + self.leftover, self.columns, self.identity).fingerprint()]
        for item in self.inputs:
            if file_kind(item.path)[0] in LISTS:
                paths = [one.data for _, one in item.read(item.path, self.columns) if isinstance(one, Picture)]
                stats = [path.stat() for path in paths if isinstance(path, Path) and os.path.isfile(path)]
                state.append(str([(one.st_size, one.st_mtime_ns) for one in stats]))
        return "\n".join(state)

    def num_documents(self) -> int | None:
        """Count the pictures if each file is one; None if that takes reading."""
        return len(self.inputs) if all(item.path.suffix.lower() in SUFFIXES for item in self.inputs) else None


def open_pictures(config: DataConfig) -> PictureSource:
    """Open the source that `config.source` names. Raises UserError where nothing that can be read matches."""
    names = [config.source] if isinstance(config.source, str) else config.source
    if not names:
        raise UserError("source is an empty list: expected at least one path")
    if names[0] in PICTURES:
        from trainfw.data.images import built_in

        return built_in.open_built_in(names[0])
    columns = (config.image_field or "", config.caption_field, config.label_field)
    kinds: dict[str, Reader] = dict.fromkeys((*SUFFIXES, *LISTS, ".txt", ".parquet", ".tar", SAVED), _nothing)
    finder = Finder(kinds, lambda path, kind: None)
    inputs: list[Input] = []
    leftover: list[Input] = []
    for name in names:
        if is_remote(name):
            inputs += _tars(name, finder)
            continue
        more, left = _of_name(name, finder)
        inputs += more
        leftover += left
    if not inputs:
        raise UserError(f"source {names[0]!r}: no picture, and nothing that names or holds some")
    return PictureSource(tuple(inputs), columns, skipped=str(finder.skipped), leftover=tuple(leftover))


def _tars(name: str, finder: Finder) -> list[Input]:
    """Return the tars of webdataset at a URL; of a store no other pictures are read, and none beside these is."""
    found = finder.find(name)
    if other := next((item for item in found if file_kind(item.path)[0] != ".tar"), None):
        raise UserError(
            f"source {name!r}: {other.name}: of pictures in a store, webdataset's .tar alone are read; copy others here"
        )
    return [item._replace(read=_read_tar) for item in found]


def _of_name(name: str, finder: Finder) -> tuple[list[Input], list[Input]]:
    """Return the inputs of a name of the source, and its pictures that are to be named by one of these."""
    path = Path(os.path.expanduser(name))
    root = path if path.is_dir() else path.parent
    while glob.has_magic(str(root)):
        root = root.parent
    found = []
    for item in finder.find(name):
        if item.local != path and outside(item.local, root) is not None:
            finder.skipped.add("link out of the source", item.name)
        else:
            found.append(item)
    by_kind: dict[str, list[Input]] = {}
    for item in found:
        kind = SAVED if item.local.is_dir() else file_kind(item.path)[0]
        by_kind.setdefault("picture" if kind in SUFFIXES else kind, []).append(item)
    pictures = by_kind.pop("picture", [])
    captions = {item.local.with_suffix(""): item.local for item in by_kind.pop(".txt", [])}
    for stem in captions.keys() - {item.local.with_suffix("") for item in pictures}:
        finder.skipped.add(".txt without a picture", captions[stem].name)
    lists = [item for kind in LISTS for item in by_kind.pop(kind, [])]
    under = {item.local.parent for item in (*lists, *by_kind.get(".parquet", []))}
    inputs = [Input(item.local, item.name, functools.partial(_read_list, root)) for item in lists]
    inputs += [Input(item.local, item.name, _READERS[kind](root)) for kind in by_kind for item in by_kind[kind]]
    left = [item for item in pictures if not under.isdisjoint(item.local.parents)]
    for item in pictures:
        if under.isdisjoint(item.local.parents):
            label = item.local.parent.name if item.local.parent != root else None
            read = functools.partial(_read_file, label, captions.get(item.local.with_suffix("")))
            inputs.append(Input(item.local, item.name, read))
    return inputs, left


def _nothing(_path: File, _columns: Columns) -> Iterator[tuple[str, object]]:
    """Read nothing: the kinds that `Finder` looks for get their readers once their directory is known."""
    return iter(())


def _read_file(label: str | None, caption: Path | None, path: File, _columns: Columns) -> Iterator[tuple[str, object]]:
    """Yield a file's picture with its folder's name, and with the text of a file beside it."""
    assert isinstance(path, Path)
    if caption is None:
        yield "", Picture(path, label)
    elif caption.stat().st_size > MEMBER:
        yield "", Unreadable("a caption that is too long")
    else:
        try:
            yield "", Picture(path, label, decode_utf8(caption.read_bytes(), caption))
        except UserError:
            yield "", Unreadable("a caption that is not UTF-8")


def _read_list(root: Path, path: File, columns: Columns) -> Iterator[tuple[str, object]]:
    """Yield the picture that each line of a JSONL file names."""
    assert isinstance(path, Path)
    for place, row in read_jsonl_values(path):
        if isinstance(row, dict):
            yield place, _of_row(row, columns, path.parent, root)
        else:
            yield place, row if isinstance(row, Unreadable) else Unreadable("not an object")


def _image_fields(columns: Columns) -> tuple[str, ...]:
    return (columns[0],) if columns[0] else ("image", "file_name")


def _of_row(row: Mapping[str, object], columns: Columns, directory: Path, root: Path) -> Picture | Unreadable:
    """Return the picture that a row holds or names, seen from its directory and below the root."""
    _, caption_field, label_field = columns
    field = next((name for name in _image_fields(columns) if row.get(name) is not None), None)
    if field is None:
        return Unreadable(f"no {' or '.join(map(repr, _image_fields(columns)))} (see image_field)")
    value = row[field]
    if isinstance(value, dict):  # as Hugging Face datasets keep pictures
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    data: Encoded
    if isinstance(value, bytes):
        data = value
    elif not isinstance(value, str):
        return Unreadable(f"{field!r} is neither a path nor a file's bytes")
    else:
        data = directory / value
        if os.path.isabs(value) or "\0" in value or outside(data, root) is not None:
            return Unreadable("a path that leads out of the source's directory")
    return Picture(data, row.get(label_field), row.get(caption_field))


def _tables(read_tables: ReadTables, root: Path) -> Reader:
    def read(path: File, columns: Columns) -> Iterator[tuple[str, object]]:
        """Yield the picture of each row of a table."""
        assert isinstance(path, Path)

        def choose(present: list[str]) -> list[str]:
            field = next((name for name in _image_fields(columns) if name in present), _image_fields(columns)[0])
            check_column(field, present, str(path), "column", "image_field")
            return [name for name in present if name in (field, *columns[1:])]

        number = 0
        for table in read_tables(path, choose, _TABLE_ROWS):
            names = _class_names(table.schema.metadata, columns[2])
            for row in table.to_pylist():
                label = row.get(columns[2])
                if names and isinstance(label, int):
                    row[columns[2]] = names[label] if 0 <= label < len(names) else None
                yield f"#{number}", _of_row(row, columns, path.parent, root)
                number += 1

    return read


def _class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """Return the names of the classes that Hugging Face datasets keep beside a column of numbers, if they do."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else []
        return names if all(isinstance(name, str) for name in names) else []
    except (KeyError, ValueError, TypeError):
        return []


class _Member(tarfile.TarInfo):
    """Member of a tar, whose header of long names cannot fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        kinds = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES)
        if member.type in kinds and member.type != tarfile.GNUTYPE_SPARSE and member.size > _HEADER:
            raise tarfile.ReadError("a header that is too long")
        return member


def _read_tar(path: File, columns: Columns) -> Iterator[tuple[str, object]]:
    """Yield the picture of each sample of webdataset's tar: consecutive members whose names differ after the dot."""
    key, parts = "", dict[str, bytes | None]()
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                directory, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not member.isreg() or not stem:
                    continue
                if f"{directory}/{stem}" != key:
                    if parts:
                        yield f":{key.strip('/')}", _sample(parts, columns)
                    key, parts = f"{directory}/{stem}", {}
                data = tar.extractfile(member) if member.size <= MEMBER else None
                parts[f".{kind.lower()}"] = None if data is None else data.read()
            if parts:
                yield f":{key.strip('/')}", _sample(parts, columns)
    except (tarfile.TarError, EOFError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a tar that can be read: {error}") from error


def _sample(parts: Mapping[str, bytes | None], columns: Columns) -> Picture | Unreadable:
    if None in parts.values():
        return Unreadable(f"a member of more than {MEMBER:,} bytes")
    picture = next((parts[kind] for kind in SUFFIXES if kind in parts), None)
    if picture is None:
        return Unreadable("no picture in its sample")
    row: dict[str, object] = {}
    try:
        if (data := parts.get(".json")) is not None:
            row = parse_json(data, "json")
        text = {kind: data.decode() for kind in (".txt", ".cls") if (data := parts.get(kind)) is not None}
    except (UserError, UnicodeDecodeError):
        return Unreadable("a caption or class that is not UTF-8, or not JSON")
    _, caption_field, label_field = columns
    return Picture(picture, text.get(".cls", row.get(label_field)), text.get(".txt", row.get(caption_field)))


_READERS: dict[str, Callable[[Path], Reader]] = {
    ".parquet": functools.partial(_tables, parquet_tables),
    SAVED: functools.partial(_tables, saved_dataset_tables),
    ".tar": lambda _root: _read_tar,
}
"""Functions from a source's directory to the reader of a kind that holds pictures."""
