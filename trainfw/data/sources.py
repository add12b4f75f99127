"""Sources: where documents come from. Everything is read as a stream; no source holds its text in memory."""

from __future__ import annotations

import functools
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

from trainfw.data.config import TASK_SOURCES, DataConfig
from trainfw.data.stdlib import read_task
from trainfw.errors import UserError, did_you_mean

STDLIB = "python-stdlib"

STDLIB_TESTS = {"test", "tests", "idle_test"}
STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages"),  # not the standard library
    *STDLIB_TESTS,  # repetitive, and some distributions leave them out
    *("encodings", "pydoc_data"),  # generated tables
}
STDLIB_BUILT_HERE = ("_sysconfigdata", "config-")
"""What these hold depends on how and where this Python was built."""

_SAVED = "/"
"""Stands for the suffix of a saved dataset, which is a directory."""
_TOOLS = "tools"
_AND = "\0"
"""Between the names of several keys."""


class Document(NamedTuple):
    """One text. `id` says where it was read: a file, with its line or row where a file holds many."""

    id: str
    text: str


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that is none."""

    reason: str


class Row(NamedTuple):
    """One row of a source of examples: an object with the keys asked for, where it has them."""

    id: str
    value: Any


Reader = Callable[[Path, str], Iterator[tuple[str, Any]]]
"""`reader(path, field)` yields (place within the file, text) for each document; of examples, `field` names several
keys, joined by `_AND`, and (place within the file, row) is yielded."""


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
    max_characters: int | None = None
    """Of a built-in task: the longest prompt taken."""

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in order. Raises UserError where an input cannot be read."""
        return (Document(*one) for one in self._read() if one[1])

    def rows(self) -> Iterator[Row]:
        """Every row, in order; of a built-in task, each prompt once. Raises UserError where an input cannot be read."""
        seen: set[bytes] = set()
        for id_, value in self._read():
            if self.identity is not None:
                prompt = value["prompt"]
                digest = hashlib.blake2b(prompt.encode(errors="replace"), digest_size=16).digest()
                if digest in seen or len(prompt) > (self.max_characters or len(prompt)):
                    continue
                seen.add(digest)
            yield Row(id_, value)

    def _read(self) -> Iterator[tuple[str, Any]]:
        for item in self.inputs:
            try:
                for place, value in item.read(item.path, self.text_field):
                    yield item.name + place, value
            except OSError as error:
                raise UserError(f"cannot read {item.path}: {error.strerror or error}") from error

    def fingerprint(self) -> str:
        """Changes when an input does: the path, size, time, first and last bytes of each file; reads no more of it."""
        state: list[Any] = [self.identity, self.text_field]
        if self.max_characters is not None:
            state.append(self.max_characters)
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
    if names[0] in TASK_SOURCES:
        return _python_stdlib(names[0], config.max_characters)
    if config.format == "text":
        field, readers = config.text_field, READERS
    else:
        chat = config.format == "chat"
        fields = (config.messages_field, _TOOLS) if chat else (config.prompt_field, config.completion_field)
        field, readers = _AND.join(fields), ROW_READERS
    if names == [STDLIB]:
        if config.format != "text":
            raise UserError(f"source: {STDLIB} is text; for {config.format}, name JSONL or Parquet files")
        return _python_stdlib()
    if STDLIB in names:
        raise UserError(f"source: {STDLIB} cannot be mixed with other sources")
    return Source(tuple(one for name in names for one in _find(name, readers)), field)


# --- Finding inputs ---------------------------------------------------------------------------------------------------


def _find(name: str, readers: dict[str, Reader]) -> list[Input]:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return [_input(path, path.parent, readers)] if _is_saved_dataset(path) else _find_in_directory(path, readers)
    if path.exists():
        return [_input(path, path.parent, readers)]
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in found if match.is_file() or _is_saved_dataset(match)]
        if not found:
            raise UserError(f"source {name!r} matches no file (seen from {Path.cwd()})")
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        return [_input(match, fixed, readers) for match in found]
    siblings = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(str(path), [STDLIB, *TASK_SOURCES, *siblings])
    raise UserError(f"source {name!r} does not exist (seen from {Path.cwd()}){hint}")


def _find_in_directory(root: Path, readers: dict[str, Reader]) -> list[Input]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    inputs = [_input(path, root, readers) for path in files if path.suffix in readers]
    if not inputs:
        suffixes = sorted({path.suffix or path.name for path in files}) or ["nothing"]
        raise UserError(
            f"source {str(root)!r}: no file that can be read (one of {', '.join(s for s in readers if s)}) "
            f"and no saved dataset; found {', '.join(suffixes[:8])}"
        )
    return inputs


def _input(path: Path, root: Path, readers: dict[str, Reader]) -> Input:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return Input(path, name, readers[_SAVED])
    suffixes = [suffix for suffix in readers if suffix != _SAVED]
    if path.suffix not in suffixes:
        hint = did_you_mean(path.suffix, suffixes)
        also = "" if ".txt" in suffixes else " as rows of examples"
        raise UserError(f"{path}: cannot read a {path.suffix or 'suffixless'} file{also}{hint}")
    return Input(path, name, readers[path.suffix])


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _python_stdlib(task: str | None = None, max_characters: int | None = None) -> Source:
    """The library's files, or the pairs of a task made of them; those of its own tests too, where installed."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = STDLIB_EXCLUDED if task is None else STDLIB_EXCLUDED - STDLIB_TESTS
    read = read_python if task is None else _TASK_READERS[task]
    inputs = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - excluded)
        for path in sorted(Path(directory, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(STDLIB_BUILT_HERE):
                inputs.append(Input(path, name, read))
    if not inputs:
        raise UserError(f"source {STDLIB}: this Python keeps no .py files in {root}; name files of your own")
    return Source(tuple(inputs), "", f"{task or STDLIB} {sys.version}", max_characters)


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
    for line, data in _lines(path):
        where = f"{path}, line {line}"
        try:
            row = json.loads(_decoded(data, path, line))
        except (ValueError, RecursionError) as error:  # also a number too long, or lists too deep
            if isinstance(error, UserError):
                raise
            shown = data[:60].decode(errors="replace").rstrip()
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{where}: not JSON ({what}): {shown}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with a {field!r} key, found {_kind(row)}")
        _check_field(field, row, where, "key")
        yield f":{line}", _checked(row[field], field, where)


def read_jsonl_rows(path: Path, fields: str) -> Iterator[tuple[str, Any]]:
    """One JSON object a line, of which the keys `fields` are kept; a line that is none is `Unreadable`."""
    for line, data in _lines(path):
        row: Any
        try:
            row = json.loads(data.decode())
        except UnicodeDecodeError:
            row = Unreadable("not UTF-8")
        except (ValueError, RecursionError):
            row = Unreadable("not JSON")
        if isinstance(row, dict):
            row = {key: row[key] for key in fields.split(_AND) if key in row}
        yield f":{line}", row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from ((line, data) for line, data in enumerate(file, start=1) if data.strip())


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """One row a document."""
    yield from _rows((row[field] for row in _parquet(path, field, optional=False)), field, path)


def read_parquet_rows(path: Path, fields: str) -> Iterator[tuple[str, Any]]:
    """One row an example, of which the columns `fields` are kept."""
    return ((f"#{number}", row) for number, row in enumerate(_parquet(path, fields, optional=True)))


def _parquet(path: Path, fields: str, *, optional: bool) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path}: reading Parquet needs pyarrow; pip install "trainfw[datasets]"') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(fields, file.schema_arrow.names, str(path), optional)
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from error


def read_saved_dataset(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A directory written by Hugging Face `save_to_disk`; of several splits, `train`."""
    yield from _rows((row[field] for row in _saved_dataset(path, field, optional=False)), field, path)


def read_saved_dataset_rows(path: Path, fields: str) -> Iterator[tuple[str, Any]]:
    """Examples from such a directory, of which the columns `fields` are kept."""
    return ((f"#{number}", row) for number, row in enumerate(_saved_dataset(path, fields, optional=True)))


def _saved_dataset(path: Path, fields: str, *, optional: bool) -> Iterator[dict[str, Any]]:
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
    columns = _columns(fields, dataset.column_names, str(path), optional)
    for batch in dataset.select_columns(columns).iter(batch_size=1024):
        yield from (dict(zip(batch, values)) for values in zip(*batch.values()))


def _columns(fields: str, found: list[str], where: str, optional: bool) -> list[str]:
    """Those to read. The first must be there; of examples, what others lack is said of each row."""
    columns = fields.split(_AND) if optional else [fields]
    if columns[0] not in found:
        _check_field(columns[0], found, where, "column", "messages_field, prompt_field" if optional else "text_field")
    return [column for column in columns if column in found]


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    _SAVED: read_saved_dataset,
}
"""How a file is read, by its suffix."""

ROW_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl_rows,
    ".parquet": read_parquet_rows,
    _SAVED: read_saved_dataset_rows,
}
"""How a file of examples is read."""

_TASK_READERS: dict[str, Reader] = {
    name: functools.partial(lambda task, path, _field: read_task(path, task), name) for name in TASK_SOURCES
}


def _decoded(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: expected UTF-8, found byte 0x{data[error.start]:02x}") from error


def _rows(values: Iterable[Any], field: str, path: Path) -> Iterator[tuple[str, str]]:
    for row, value in enumerate(values):
        yield f"#{row}", _checked(value, field, f"{path}, row {row}")


def _check_field(field: str, found: Iterable[str], where: str, word: str, option: str = "text_field") -> None:
    found = list(found)
    if field not in found:
        if option == "text_field":
            for format_, keys in {"chat": {"messages"}, "prompt_completion": {"prompt", "completion"}}.items():
                if keys <= set(found):
                    listed = " and ".join(repr(key) for key in sorted(keys, reverse=True))
                    raise UserError(f"{where}: no {word} {field!r}, but {listed}: did you mean data.format: {format_}?")
        listed = ", ".join(repr(name) for name in found[:12]) or "none"
        hint = did_you_mean(field, found) if len(found) > 1 else ""
        raise UserError(f"{where}: no {word} {field!r} (see {option}); {word}s found: {listed}{hint}")


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
