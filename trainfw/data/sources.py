"""Sources: where documents come from. Everything is read as a stream; no source holds its text in memory."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainfw.data.config import DataConfig
from trainfw.errors import UserError, did_you_mean

STDLIB = "python-stdlib"

STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages"),  # not the standard library
    *("test", "tests", "idle_test"),  # repetitive, and some distributions leave them out
    *("encodings", "pydoc_data"),  # generated tables
}
STDLIB_BUILT_HERE = ("_sysconfigdata", "config-")
"""What these hold depends on how and where this Python was built."""


class Document(NamedTuple):
    """One text. `id` says where it was read: a file, with its line or row where a file holds many."""

    id: str
    text: str


Reader = Callable[[Path, str], Iterator[tuple[str, str]]]
"""`reader(path, text_field)` yields (place within the file, text) for each document."""


@dataclass(frozen=True)
class Input:
    """A file (or a saved dataset's directory) and how to read it; `name` is its path within its source."""

    path: Path
    name: str
    read: Reader


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, from a list of inputs."""

    inputs: tuple[Input, ...]
    text_field: str
    identity: str | None = None
    """What the source is, where that is known better than by the times of its files (`python-stdlib`)."""

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in order. Raises UserError where an input cannot be read."""
        for item in self.inputs:
            try:
                for place, text in item.read(item.path, self.text_field):
                    if text:
                        yield Document(item.name + place, text)
            except OSError as error:
                raise UserError(f"cannot read {item.path}: {error.strerror or error}") from error

    def fingerprint(self) -> str:
        """Changes when an input does: the path, size, time, first and last bytes of each file; reads no more of it."""
        state: list[Any] = [self.identity, self.text_field]
        for item in self.inputs:
            for path in sorted(item.path.rglob("*")) if item.path.is_dir() else [item.path]:
                stat = path.stat()
                known = () if self.identity else (str(path.resolve()), stat.st_mtime_ns, _ends(path, stat.st_size))
                state.append((item.name, path.name, stat.st_size, *known))
        return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()

    def num_documents(self) -> int | None:
        """How many documents there are, where that is one per file; None where it takes reading."""
        return len(self.inputs) if all(item.read in (read_text, read_python) for item in self.inputs) else None


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names. Raises UserError where it matches nothing that can be read."""
    names = [config.source] if isinstance(config.source, str) else config.source
    if not names:
        raise UserError("source is an empty list: expected at least one path")
    if names == [STDLIB]:
        return _python_stdlib()
    if STDLIB in names:
        raise UserError(f"source: {STDLIB} cannot be mixed with other sources")
    return Source(tuple(one for name in names for one in _find(name)), config.text_field)


# --- Finding inputs ---------------------------------------------------------------------------------------------------


def _find(name: str) -> list[Input]:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return [_input(path, path.parent)] if _is_saved_dataset(path) else _find_in_directory(path)
    if path.exists():
        return [_input(path, path.parent)]
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in found if match.is_file() or _is_saved_dataset(match)]
        if not found:
            raise UserError(f"source {name!r} matches no file (seen from {Path.cwd()})")
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        return [_input(match, fixed) for match in found]
    siblings = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(str(path), [STDLIB, *siblings])
    raise UserError(f"source {name!r} does not exist (seen from {Path.cwd()}){hint}")


def _find_in_directory(root: Path) -> list[Input]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    inputs = [_input(path, root) for path in files if path.suffix in READERS]
    if not inputs:
        suffixes = sorted({path.suffix or path.name for path in files}) or ["nothing"]
        raise UserError(
            f"source {str(root)!r}: no file that can be read (one of {', '.join(READERS)}) "
            f"and no saved dataset; found {', '.join(suffixes[:8])}"
        )
    return inputs


def _input(path: Path, root: Path) -> Input:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return Input(path, name, read_saved_dataset)
    if path.suffix not in READERS:
        raise UserError(f"{path}: cannot read a {path.suffix or 'suffixless'} file{did_you_mean(path.suffix, READERS)}")
    return Input(path, name, READERS[path.suffix])


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _python_stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    inputs = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - STDLIB_EXCLUDED)
        for path in sorted(Path(directory, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(STDLIB_BUILT_HERE):
                inputs.append(Input(path, name, read_python))
    if not inputs:
        raise UserError(f"source {STDLIB}: this Python keeps no .py files in {root}; name files of your own")
    return Source(tuple(inputs), "", identity=f"{STDLIB} {sys.version}")


# --- Reading one input ------------------------------------------------------------------------------------------------


def read_text(path: Path, _field: str) -> Iterator[tuple[str, str]]:
    """The whole file as one document."""
    yield "", _decoded(path.read_bytes(), path, line=1)


def _ends(path: Path, size: int, block: int = 2**16) -> str:
    """A hash of a file's first and last block: times and sizes alone agree where images or archives set them."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        first = file.read(block)
        file.seek(max(size - block, 0))
        return hashlib.blake2b(first + file.read(block), digest_size=16).hexdigest()


def read_python(path: Path, _field: str) -> Iterator[tuple[str, str]]:
    """A Python file as one document, in the encoding that it declares; skipped where it does not decode."""
    try:
        with tokenize.open(path) as file:
            yield "", file.read()
    except (SyntaxError, UnicodeDecodeError):
        return


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """One JSON object a line; blank lines are skipped."""
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            where = f"{path}, line {line}"
            try:
                row = json.loads(_decoded(data, path, line))
            except (ValueError, RecursionError) as error:  # also a number too long, or lists too deep
                shown = data[:60].decode(errors="replace").rstrip()
                what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"{where}: not JSON ({what}): {shown}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object with a {field!r} key, found {_kind(row)}")
            _check_field(field, row, where, "key")
            yield f":{line}", _checked(row[field], field, where)


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """One row a document."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path}: reading Parquet needs pyarrow; pip install "trainfw[datasets]"') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_field(field, file.schema_arrow.names, str(path), "column")
            batches = file.iter_batches(columns=[field], batch_size=1024)
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            yield from _rows(values, field, path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from error


def read_saved_dataset(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A directory written by Hugging Face `save_to_disk`; of several splits, `train`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'{path}: a saved dataset needs datasets; pip install "trainfw[datasets]"') from error
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            splits = ", ".join(dataset)
            raise UserError(f"{path}: no `train` split; name one split's directory, such as {path}/SPLIT ({splits})")
        dataset = dataset["train"]
    _check_field(field, dataset.column_names, str(path), "column")
    batches = dataset.select_columns([field]).iter(batch_size=1024)
    yield from _rows((value for batch in batches for value in batch[field]), field, path)


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""How a file is read, by its suffix."""


def _decoded(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: expected UTF-8, found byte 0x{data[error.start]:02x}") from error


def _rows(values: Iterable[Any], field: str, path: Path) -> Iterator[tuple[str, str]]:
    for row, value in enumerate(values):
        yield f"#{row}", _checked(value, field, f"{path}, row {row}")


def _check_field(field: str, found: Iterable[str], where: str, word: str) -> None:
    found = list(found)
    if field not in found:
        listed = ", ".join(repr(name) for name in found[:12]) or "none"
        hint = did_you_mean(field, found) if len(found) > 1 else ""
        raise UserError(f"{where}: no {word} {field!r} (see text_field); {word}s found: {listed}{hint}")


def _checked(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected {field!r} to be text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{where}: {field!r} has a lone surrogate at character {error.start}") from error
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
