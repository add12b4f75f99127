"""Readers: one file as documents or as rows of examples, by its kind."""

from __future__ import annotations

import functools
import itertools
import json
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.data.arrow import SAVED, NotText, ReadTables, parquet_tables, saved_dataset_tables, table_rows
from trainfw.data.compressed import LIMIT, File, open_plain, skip_to
from trainfw.data.json_values import json_values, not_json
from trainfw.data.remote import StoreError
from trainfw.errors import UserError, did_you_mean
from trainfw.json_text import WrittenTwice, unique
from trainfw.utf8 import decode_utf8, without_mark

Columns = tuple[str, ...]
"""Keys (JSON) or columns (Arrow) to read: one for documents; for examples several, of which the first must be there."""

Reader = Callable[[File, Columns], Iterator[tuple[str, Any]]]
"""Function that yields (place within the file, text) for each document, or (place within the file, row) for each
example, an object with those of the columns that it has. Raises UserError for a file that cannot be read."""

_FIELD_KEYS = "messages_field, prompt_field, chosen_field"
_KEYS_OF_FORMATS = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "preferences": ("chosen", "rejected"),
}


@dataclass(frozen=True)
class Unreadable:
    """Stand-in for a row that cannot be used, with the reason."""

    reason: str


def read_text(path: File, _columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield the whole file as one document."""
    blocks, size = [], 0
    with open_plain(path) as file:
        while block := file.read(2**20):  # `read(LIMIT)` would ask for as much memory at once
            blocks.append(block)
            if (size := size + len(block)) > LIMIT:
                raise UserError(f"{path}: a document of more than {LIMIT:,} bytes; cut it, or make it rows of JSONL")
    text = decode_utf8(b"".join(blocks), path)
    blocks.clear()
    if 4 * text.count("\0", 0, 1024) > len(text[:1024]):
        raise UserError(f"{path}: a quarter of it is NUL characters: no text, or UTF-16; expected UTF-8")
    yield "", text


def read_python(path: File, _columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield a Python file as one document, in the encoding that it declares; nothing where it does not decode."""
    assert isinstance(path, Path)  # of this Python's own library
    try:
        with tokenize.open(path) as file:
            yield "", file.read()
    except (SyntaxError, UnicodeDecodeError):
        return


def read_jsonl(path: File, columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield the document of each line, a JSON object; blank lines are skipped."""
    for line, data, _ in _lines(path):
        yield f":{line}", _document_of(data, path, line, columns)


def _document_of(data: bytes, path: File, line: int, columns: Columns) -> str:
    text, where = decode_utf8(data, path, line), f"{path}, line {line}"
    try:
        row = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also a number too long, or lists too deep
        raise not_json(error, where, text) from error
    return document(row, columns, where)


def read_jsonl_rows(path: File, columns: Columns) -> Iterator[tuple[str, object]]:
    """Yield the example of each line; `Unreadable` for a line that is no JSON object."""
    return ((place, example(value, columns)) for place, value in read_jsonl_values(path))


def read_jsonl_values(path: File) -> Iterator[tuple[str, object]]:
    """Yield the value of each line; `Unreadable` for a line that is no JSON."""
    for line, data, _ in _lines(path):
        row: Any
        try:
            row = json.loads(data.decode(), object_pairs_hook=unique)
        except UnicodeDecodeError:
            row = Unreadable("not UTF-8")
        except WrittenTwice as error:
            row = Unreadable(str(error))
        except (ValueError, RecursionError):
            row = Unreadable("not JSON")
        yield f":{line}", row


def read_json(path: File, columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield the document of each object in a JSON file: a list of objects, or objects one after another."""
    return ((place, document(value, columns, where)) for place, where, value in json_values(path))


def read_json_rows(path: File, columns: Columns) -> Iterator[tuple[str, object]]:
    """Yield the example of each object in a JSON file: a list of objects, or objects one after another."""
    return ((place, example(value, columns)) for place, _, value in json_values(path))


def why_no_rows(path: File, columns: Columns) -> str | None:
    """Say in a few words why the first value of a .json file, which may hold anything, is no row; None if it is one."""
    try:
        first = next((value for *_, value in json_values(path)), None)
    except StoreError:
        raise
    except UserError as error:
        return str(error).removeprefix(str(path)).lstrip(",: ")
    return None if isinstance(first, dict) and columns[0] in first else f"no {columns[0]!r}"


def _lines(path: File, line: int = 1, offset: int = 0) -> Iterator[tuple[int, bytes, int]]:
    """Yield each line that is not blank: number, bytes without a byte-order mark (files are put together), its end.

    Args:
        line: the first to yield, which begins at the `offset` (bytes, decompressed).
    """
    with open_plain(path) as file:
        skip_to(file, offset)
        for number, data in enumerate(iter(functools.partial(file.readline, LIMIT + 1), b""), start=line):
            offset += len(data)
            if len(data) > LIMIT:
                raise UserError(f"{path}, line {number}: longer than {LIMIT:,} bytes")
            try:
                data = without_mark(data)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            if data.strip():
                yield number, data, offset


def _chosen(
    read: ReadTables, path: File, columns: Columns, option: str, first: int = 0
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the number and the columns of each row of a table from `first` on; only the first column must be there."""

    def choose(present: list[str]) -> list[str]:
        check_column(columns[0], present, str(path), "column", option)
        return [column for column in columns if column in present]

    return enumerate(table_rows(read(path, choose, first=first)), first)


def _documents(read: ReadTables, path: File, columns: Columns, first: int = 0) -> Iterator[tuple[str, str]]:
    for number, row in _chosen(read, path, columns, "text_field", first):
        yield f"#{number}", _checked_text(row[columns[0]], columns[0], f"{path}, row {number}")


def _examples(read: ReadTables, path: File, columns: Columns) -> Iterator[tuple[str, object]]:
    return ((f"#{number}", row) for number, row in _chosen(read, path, columns, _FIELD_KEYS))


READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".md", ".py"), read_text),
    ".jsonl": read_jsonl,
    ".parquet": functools.partial(_documents, parquet_tables),
    ".json": read_json,
    ".ndjson": read_jsonl,
    SAVED: functools.partial(_documents, saved_dataset_tables),
}
"""Readers of documents, by the suffix of their files."""

ROW_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl_rows,
    ".parquet": functools.partial(_examples, parquet_tables),
    ".json": read_json_rows,
    ".ndjson": read_jsonl_rows,
    SAVED: functools.partial(_examples, saved_dataset_tables),
}
"""Readers of examples, by the suffix of their files."""


Place = tuple[int, int]
"""Place in a file of documents: of JSONL the bytes (decompressed) and the lines before it; of others the documents."""
BEGIN: Place = (0, 0)


def documents_from(kind: str, read: Reader, path: File, columns: Columns, place: Place) -> Iterator[tuple[str, Place]]:
    """Yield each document of a file from a place on, and the place after it.

    JSONL is entered at its byte (compressed, it is decompressed up to there), Parquet at its group of rows.
    """
    if kind in _LINES:
        offset, lines = place
        for line, data, end in _lines(path, lines + 1, offset):
            yield _document_of(data, path, line, columns), (end, line)
        return
    done, _ = place
    if kind == ".parquet":
        found = _documents(parquet_tables, path, columns, done)
    else:
        found = itertools.islice(read(path, columns), done, None)
    for number, (_, text) in enumerate(found, start=done + 1):
        yield text, (number, 0)


_LINES = (".jsonl", ".ndjson")


def example(row: object, columns: Columns) -> object:
    """Return an object's values of these columns; `Unreadable` where it lacks the first. What is no object is left."""
    if not isinstance(row, dict):
        return row
    if columns[0] not in row:
        keys = ", ".join(repr(key) for key in sorted(row)[:6]) or "none"
        return Unreadable(f"no {columns[0]!r} (see {_FIELD_KEYS}); keys found: {keys}")
    return {key: row[key] for key in columns if key in row}


def document(row: object, columns: Columns, where: str) -> str:
    """Return an object's text in the one column. Raises UserError where it has none."""
    [column] = columns
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with a {column!r} key, found {_kind(row)}")
    check_column(column, list(row), where, "key")
    return _checked_text(row[column], column, where)


def check_column(column: str, present: list[str], where: str, word: str, option: str = "text_field") -> None:
    """Raise UserError, with the nearest name, where a column is not among those that are there.

    Args:
        word: "key" or "column", as this kind of file has them.
        option: the key of a recipe that names the column.
    """
    if column in present:
        return
    if option == "text_field":
        for format_, keys in _KEYS_OF_FORMATS.items():
            if {*keys} <= {*present}:
                listed = " and ".join(map(repr, keys))
                raise UserError(f"{where}: no {word} {column!r}, but {listed}: did you mean data.format: {format_}?")
    listed = ", ".join(repr(name) for name in present[:12]) or "none"
    hint = did_you_mean(column, present) if len(present) > 1 else ""
    raise UserError(f"{where}: no {word} {column!r} (see {option}); {word}s found: {listed}{hint}")


def _checked_text(value: object, column: str, where: str) -> str:
    """Return a document's text. Raises UserError for what is not text, or cannot be written in UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{where}: expected {column!r} to be text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{where}: {column!r} has a lone surrogate at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return value.kind if isinstance(value, NotText) else f"{type(value).__name__} {str(value)[:40]!r}"
