"""Readers: one file as documents or as rows of examples, by its kind."""

from __future__ import annotations

import functools
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.data.arrow import NotText, parquet_rows, saved_dataset_rows
from trainfw.data.compressed import LIMIT, open_plain
from trainfw.data.files import SAVED
from trainfw.data.json_values import WrittenTwice, json_values, not_json, unique
from trainfw.errors import UserError, did_you_mean
from trainfw.utf8 import decode_utf8, without_mark

Reader = Callable[[Path, str], Iterator[tuple[str, Any]]]
"""`reader(path, field)` yields (place within the file, text) for each document; of examples, `field` names several
keys, joined by `AND`, and (place within the file, row) is yielded."""

AND = "\0"
"""Between the names of several keys."""

_FIELD_KEYS = "messages_field, prompt_field, chosen_field"
_KEYS_OF_FORMATS = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "preferences": ("chosen", "rejected"),
}


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that is none."""

    reason: str


# --- Text -------------------------------------------------------------------------------------------------------------


def read_text(path: Path, _field: str) -> Iterator[tuple[str, str]]:
    """The whole file as one document."""
    blocks, size = [], 0
    with open_plain(path) as file:
        while block := file.read(2**20):  # `read(LIMIT)` would ask for as much memory at once
            blocks.append(block)
            if (size := size + len(block)) > LIMIT:
                raise UserError(f"{path}: a document of more than {LIMIT:,} bytes; cut it, or make it rows of JSONL")
    text = decode_utf8(b"".join(blocks), path)
    if 4 * text.count("\0", 0, 1024) > len(text[:1024]):
        raise UserError(f"{path}: a quarter of it is NUL characters: no text, or UTF-16; expected UTF-8")
    yield "", text


def read_python(path: Path, _field: str) -> Iterator[tuple[str, str]]:
    """A Python file as one document, in the encoding that it declares; skipped where it does not decode."""
    try:
        with tokenize.open(path) as file:
            yield "", file.read()
    except (SyntaxError, UnicodeDecodeError):
        return


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """One JSON object a line; blank lines are skipped."""
    for line, data in _lines(path):
        yield f":{line}", _field_of(_parsed(data, path, line), field, f"{path}, line {line}")


def read_jsonl_rows(path: Path, fields: str) -> Iterator[tuple[str, object]]:
    """One JSON object a line, of which the keys `fields` are kept; a line that is none is `Unreadable`."""
    for line, data in _lines(path):
        row: Any
        try:
            row = _kept(json.loads(data.decode(), object_pairs_hook=unique), fields)
        except UnicodeDecodeError:
            row = Unreadable("not UTF-8")
        except WrittenTwice as error:
            row = Unreadable(str(error))
        except (ValueError, RecursionError):
            row = Unreadable("not JSON")
        yield f":{line}", row


def read_json(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A list of objects, or objects one after another: one, or one a line."""
    for place, where, value in json_values(path):
        yield place, _field_of(value, field, where)


def read_json_rows(path: Path, fields: str) -> Iterator[tuple[str, object]]:
    """The same, of which the keys `fields` are kept."""
    return ((place, _kept(value, fields)) for place, _, value in json_values(path))


def why_no_rows(path: Path, fields: str) -> str | None:
    """None where the first value of a .json file, which may be anything, is a row; else in a few words why not."""
    field = fields.split(AND)[0]
    try:
        first = next((value for *_, value in json_values(path)), None)
    except UserError as error:
        return str(error).removeprefix(str(path)).lstrip(",: ")
    return None if isinstance(first, dict) and field in first else f"no {field!r}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, by number, each without a byte-order mark (files are put together)."""
    with open_plain(path) as file:
        for line, data in enumerate(iter(functools.partial(file.readline, LIMIT + 1), b""), start=1):
            if len(data) > LIMIT:
                raise UserError(f"{path}, line {line}: longer than {LIMIT:,} bytes")
            try:
                data = without_mark(data)
            except ValueError as error:
                raise UserError(f"{path}, line {line}: {error}") from None
            if data.strip():
                yield line, data


def _parsed(data: bytes, path: Path, line: int) -> object:
    text = decode_utf8(data, path, line)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also a number too long, or lists too deep
        raise not_json(error, f"{path}, line {line}", text) from error


# --- Parquet and saved datasets ---------------------------------------------------------------------------------------


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """One row a document."""
    return _texts(parquet_rows, path, field)


def read_parquet_rows(path: Path, fields: str) -> Iterator[tuple[str, object]]:
    """One row an example, of which the columns `fields` are kept."""
    return _examples(parquet_rows, path, fields)


def read_saved_dataset(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A directory written by Hugging Face `save_to_disk`; of several splits, `train`."""
    return _texts(saved_dataset_rows, path, field)


def read_saved_dataset_rows(path: Path, fields: str) -> Iterator[tuple[str, object]]:
    """Examples from such a directory, of which the columns `fields` are kept."""
    return _examples(saved_dataset_rows, path, fields)


def _texts(rows: Callable[..., Iterator[dict[str, object]]], path: Path, field: str) -> Iterator[tuple[str, str]]:
    def choose(found: list[str]) -> list[str]:
        _check_field(field, found, str(path), "column")
        return [field]

    for number, row in enumerate(rows(path, choose)):
        yield f"#{number}", _checked(row[field], field, f"{path}, row {number}")


def _examples(
    rows: Callable[..., Iterator[dict[str, object]]], path: Path, fields: str
) -> Iterator[tuple[str, object]]:
    def choose(found: list[str]) -> list[str]:
        first, *others = fields.split(AND)  # what others lack is said of each row
        _check_field(first, found, str(path), "column", _FIELD_KEYS)
        return [first, *(column for column in others if column in found)]

    return ((f"#{number}", row) for number, row in enumerate(rows(path, choose)))


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_json,
    ".ndjson": read_jsonl,
    SAVED: read_saved_dataset,
}
"""How a file is read, by its suffix."""

ROW_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl_rows,
    ".parquet": read_parquet_rows,
    ".json": read_json_rows,
    ".ndjson": read_jsonl_rows,
    SAVED: read_saved_dataset_rows,
}
"""How a file of examples is read."""


# --- What a row holds -------------------------------------------------------------------------------------------------


def _kept(row: object, fields: str) -> object:
    """Of an object, the keys that are read; one without the first of them is `Unreadable`."""
    if not isinstance(row, dict):
        return row
    first, *others = fields.split(AND)
    if first not in row:
        found = ", ".join(repr(key) for key in sorted(row)[:6]) or "none"
        return Unreadable(f"no {first!r} (see {_FIELD_KEYS}); keys found: {found}")
    return {key: row[key] for key in (first, *others) if key in row}


def _field_of(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with a {field!r} key, found {_kind(row)}")
    _check_field(field, row, where, "key")
    return _checked(row[field], field, where)


def _check_field(field: str, found: Iterable[str], where: str, word: str, option: str = "text_field") -> None:
    found = list(found)
    if field not in found:
        if option == "text_field":
            for format_, keys in _KEYS_OF_FORMATS.items():
                if {*keys} <= {*found}:
                    listed = " and ".join(map(repr, keys))
                    raise UserError(f"{where}: no {word} {field!r}, but {listed}: did you mean data.format: {format_}?")
        listed = ", ".join(repr(name) for name in found[:12]) or "none"
        hint = did_you_mean(field, found) if len(found) > 1 else ""
        raise UserError(f"{where}: no {word} {field!r} (see {option}); {word}s found: {listed}{hint}")


def _checked(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected {field!r} to be text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{where}: {field!r} has a lone surrogate at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    if value is None or isinstance(value, NotText):
        return "null" if value is None else value.kind
    return f"{type(value).__name__} {str(value)[:40]!r}"
