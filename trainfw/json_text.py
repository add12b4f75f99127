"""JSON from strangers: what is not plainly right is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from trainfw.errors import UserError
from trainfw.paths import check_file
from trainfw.utf8 import without_mark

LIMIT = 1 << 24
"""Bytes of JSON that are read at most. A tensor takes about 100 in a header: no file of our families has so many."""
TOKENIZER_LIMIT = 1 << 28
"""Bytes of a tokenizer that are read at most. That of Gemma 3 has 33 MB."""
MAX_DEPTH = 64
"""Objects and lists within one another: Python's own recursion limit is met later, by whoever prints or writes them."""


def read_json(file: Path, limit: int = LIMIT) -> dict[str, object]:
    """Read the object in a JSON file of a model, which may begin with a byte-order mark."""
    return json_object(read_member(file, limit), file)


def read_member(file: Path, limit: int = LIMIT) -> bytes:
    """Read a file of a model's directory. Raises UserError for no file (`check_file`), or one larger than `limit`."""
    check_file(file)
    if file.stat().st_size > limit:
        raise UserError(f"{file}: is {file.stat().st_size:,} bytes; expected {limit:,} at most")
    return file.read_bytes()


def json_object(data: bytes, file: Path) -> dict[str, object]:
    """Parse the object in a file, whose bytes are given."""
    try:
        data = without_mark(data)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    return parse_json(data, str(file))


class WrittenTwice(ValueError):
    """An object with a key that is written twice: some readers take the first value, others the last."""


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON (as `object_pairs_hook`). Raises WrittenTwice for a key that is written twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise WrittenTwice(f"key {twice[:40]!r} is written twice")
    return value


def parse_json(data: bytes, what: str) -> dict[str, object]:
    """Parse an object. Keys written twice, NaN and infinity are refused, since readers differ on what they mean, and
    so are halves of surrogate pairs, which no file and no terminal takes.
    """

    def constants(text: str) -> object:
        raise ValueError(f"{text} is not a number")

    def floats(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is beyond the largest number")
        return value

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constants, parse_float=floats)
        _check_depth(value)
        if _SURROGATE.search(data):  # a pair, or half of one
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{what}: not valid JSON: nested too deeply") from None
    except UnicodeEncodeError:
        raise UserError(f"{what}: not valid JSON: it holds half of a surrogate pair") from None
    except ValueError as error:  # what is not UTF-8 is one too
        raise UserError(f"{what}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _check_depth(value: object) -> None:
    """Raise RecursionError for what is nested beyond `MAX_DEPTH`."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return
    raise RecursionError
