"""JSON from strangers: what is not plainly right is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainfw.errors import UserError
from trainfw.paths import check_file
from trainfw.utf8 import without_mark

LIMIT = 100_000_000
"""Bytes of JSON that are read at most: the safetensors format's own limit for a header."""


def read_json(file: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The object in a JSON file, which may begin with a byte-order mark."""
    check_file(file)
    if file.stat().st_size > limit:
        raise UserError(f"{file}: is {file.stat().st_size:,} bytes; expected {limit:,} at most")
    try:
        data = without_mark(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    return parse_json(data, str(file))


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """An object; keys that are written twice, NaN and infinity are refused, since readers differ on what they mean."""

    def objects(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key[:80]!r} is written twice")
            found[key] = value
        return found

    def constants(text: str) -> Any:
        raise ValueError(f"{text} is not a number")

    def floats(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is beyond the largest number")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=objects, parse_constant=constants, parse_float=floats
        )
    except RecursionError:
        raise UserError(f"{what}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # what is not UTF-8 is one too
        raise UserError(f"{what}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value
