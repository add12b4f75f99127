"""Stream of the values in a JSON file, in a list or one after another."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainfw.data.compressed import LIMIT, File, open_plain
from trainfw.errors import UserError
from trainfw.json_text import unique
from trainfw.utf8 import without_mark

_BLOCK = 2**20
"""Bytes read at once."""


def json_values(path: File) -> Iterator[tuple[str, str, object]]:
    """Yield (place, place in words, value) for each element of a list, or for each value where there is no list.

    Raises UserError, with the line, for text that is not JSON.
    """
    with open_plain(path) as file:
        text = _JsonText(file, path)
        if text.peek() != "[":
            while text.peek():
                line = text.line
                yield f":{line}", f"{path}, line {line}", text.value()
            return
        text.take("[")
        row = 0
        while text.peek() != "]":
            if row:
                text.take(",")
                text.peek()
            line = text.line
            yield f"#{row}", f"{path}, row {row} (line {line})", text.value()
            row += 1
        text.take("]")
        if text.peek():
            raise UserError(f"{path}, line {text.line}: not JSON: something follows the list: {text.rest[:60]}")


def not_json(error: Exception, where: str, text: str) -> UserError:
    problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{where}: not JSON ({problem}): {text[:60].rstrip()}")


class _JsonText:
    """The text of a JSON file from some place on; memory holds the value there and one block."""

    _SPACE = re.compile(r"[ \t\n\r]*")
    _parse = json.JSONDecoder(object_pairs_hook=unique).raw_decode

    def __init__(self, file: BinaryIO, path: File) -> None:
        self.line = 1
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._started = "", 0, False
        self._more()

    def peek(self) -> str:
        """Return the next character that is no space; the empty string at the end."""
        while True:
            self._move(self._SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            rest = repr(self.rest[:60]) if self.rest else "the end: was it cut short?"
            raise UserError(f"{self._path}, line {self.line}: not JSON: expected {character!r}, found {rest}")
        self._move(self._at + 1)

    def value(self) -> Any:
        self.peek()
        while True:
            text, at = self._text, self._at
            try:
                value, end = self._parse(text, at)
                if end > len(text) - 4 and self._more():  # a number may go on
                    continue
                self._move(end)
                return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                if not (cut and self._more()):
                    where = f"{self._path}, line {self.line + text.count(chr(10), at, error.pos)}"
                    raise UserError(f"{where}: not JSON ({error.msg}): {text[error.pos :][:60].rstrip()}") from error
            except (ValueError, RecursionError) as error:
                raise not_json(error, f"{self._path}, line {self.line}", text[at:]) from error

    @property
    def rest(self) -> str:
        return self._text[self._at :]

    def _move(self, at: int) -> None:
        self.line += self._text.count("\n", self._at, at)
        self._at = at

    def _more(self) -> bool:
        """Read more of the file, as much again as is held; return False at its end."""
        rest = self.rest
        data = self._file.read(max(_BLOCK, len(rest)))
        if len(rest) + len(data) > LIMIT:
            raise UserError(f"{self._path}, line {self.line}: a value of more than {LIMIT:,} bytes")
        try:
            more = self._decoder.decode(data if self._started else without_mark(data), not data)
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            raise UserError(f"{self._path}, line {line}: expected UTF-8, found {error.reason}") from error
        except ValueError as error:
            raise UserError(f"{self._path}: {error}") from None
        if data:
            self._text, self._at, self._started = rest + more, 0, True
        return bool(data)
