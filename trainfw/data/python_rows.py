"""Rows that Python code gives: in memory, from a script, or by a function that a recipe names."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainfw.data.config import DataConfig
from trainfw.data.images.sources import open_pictures
from trainfw.data.readers import document, example
from trainfw.data.sources import Source, columns_of, open_source
from trainfw.data.store import TokenStore
from trainfw.errors import UserError, short
from trainfw.pieces import blaming, is_own, load_piece, name_of

IN_MEMORY = "in-memory:"
"""Prefix by which a recipe names a source that a script hands over; its kind follows."""
TOKENS = ("input_ids", "tokens")
"""Keys of a row that is tokenised already."""
_WEIGHTS = ("labels", "loss_mask", "completion_mask")
"""Keys by which a tokenised row says that not all of it is learnt."""


@dataclass(frozen=True)
class RowSource(Source):
    """Documents or examples that Python code gives, the same ones each time that it is asked."""

    name: str = ""
    give: Callable[[], Iterable[Any]] = tuple
    text: bool = True
    count: int | None = None

    def _read(self) -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(self.give()):
            where = f"{self.name}#{number}"
            if not self.text:
                yield where, example(row, self.columns)
            else:
                yield where, document({self.columns[0]: row} if isinstance(row, str) else row, self.columns, where)

    def fingerprint(self) -> str:
        """Changes when a row does: all of them are read for it."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        whole = hashlib.blake2b(digest_size=16)
        for _, value in self._read():
            whole.update(json.dumps(value, sort_keys=True, default=repr).encode() + b"\n")
        return whole.hexdigest()

    def num_documents(self) -> int | None:
        return self.count


def source_of(config: DataConfig) -> Source:
    """Return the source that `config.source` names: files, a built-in one, or a function `package.module:name`."""
    if config.format == "images":
        return open_pictures(config)
    name = config.source if isinstance(config.source, str) else config.source[0] if len(config.source) == 1 else ""
    if name.startswith(IN_MEMORY):
        raise UserError(
            f"source = {name!r}: a script handed it over, as data= of trainfw.train, and it is in no file: run that "
            "script, or name another source"
        )
    if not is_own(name) or Path(name).exists():
        return open_source(config)
    give = load_piece(name)
    if not callable(give):
        raise UserError(f"source = {name!r}: is a {type(give).__name__}; expected a function that returns rows")
    return row_source(name, give, config)


def row_source(name: str, give: Callable[[], Iterable[Any]], config: DataConfig, count: int | None = None) -> RowSource:
    """Return the source of the rows that a function gives, `data.max_documents` of them at most."""
    return RowSource(
        inputs=(),
        columns=columns_of(config),
        name=name,
        give=lambda: itertools.islice(_each(name, give), config.max_documents),
        text=config.format == "text",
        count=count if config.max_documents is None else None,
    )


def begin_rows(name: str, give: Callable[[], object]) -> Iterator[Any]:
    """Begin the rows that a function gives. Raises UserError, which names the source, where it fails or gives none."""
    with blaming(f"source = {name!r}"):
        rows = give()
        if isinstance(rows, str | bytes | Mapping | type) or not (hasattr(rows, "__iter__") or is_rows(rows)):
            raise UserError(f"source = {name!r}: gives {short(rows, 40)}; expected rows, or an iterator of them")
        return iter(rows)  # type: ignore[call-overload]


def _each(name: str, give: Callable[[], object]) -> Iterator[Any]:
    """Yield the rows that a function gives. Raises UserError, which names the source, where its code fails."""
    with blaming(f"source = {name!r}"):
        yield from begin_rows(name, give)


def data_name(given: Any) -> str:
    """Return how a recipe names data that a script hands over. Raises UserError where that is no data."""
    kind = name_of(given)
    if isinstance(given, str | bytes | Path):
        raise UserError(f"source = {str(given)!r}: a path goes into the recipe, as data.source; expected rows as data=")
    if isinstance(given, Mapping):
        raise UserError(
            f"source = {kind}: has splits {', '.join(map(repr, list(given)[:6]))}; expected rows, such as "
            "data['train'] (what is held out is chosen by data.validation_fraction)"
        )
    if isinstance(given, type) and is_rows(given):
        raise UserError(f"source = {kind}: is a class; expected rows, which {given.__name__}(...) may hold")
    if not (is_rows(given) or callable(given) or hasattr(given, "__iter__")):
        raise UserError(f"source = {kind}: expected rows, an iterator of them, or a function that returns one")
    return IN_MEMORY + kind.removeprefix("builtins:")


def is_rows(given: Any) -> bool:
    """Tell whether data is all there, to be read in any order, rather than to be read as it comes."""
    return hasattr(given, "__len__") and hasattr(given, "__getitem__")


def memory_source(given: Sequence[Any], config: DataConfig) -> RowSource:
    return row_source(data_name(given), lambda: given, config, len(given))


def tokens_of(row: Any) -> np.ndarray | None:
    """Return the tokens of a row that is tokenised already: numbers, or a dict of them; None where it is not.

    Raises UserError where it says that not all of them are learnt, which nothing here reads.
    """
    if isinstance(row, Mapping):
        if weights := [key for key in _WEIGHTS if key in row]:
            raise UserError(f"source: a tokenised row has {weights[0]!r}, which is not read; every token is learnt")
        row = next((row[key] for key in TOKENS if key in row), None)
    if row is None or isinstance(row, str | bytes):
        return None
    tokens = np.asarray(row)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or (tokens.size and tokens.min() < 0):
        raise UserError(f"source: a row is {str(row)[:40]!r}; expected text, or token ids: whole numbers from 0")
    return tokens.astype(np.int32)


def held_tokens(documents: Iterable[np.ndarray], num_bytes: Callable[[np.ndarray], int]) -> TokenStore:
    """Return a store in memory of documents that are tokenised already, with their own markers."""
    kept, whole = list(documents), hashlib.blake2b(digest_size=16)
    for tokens in kept:
        whole.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
    ends, size = np.cumsum([0, *map(len, kept)], dtype=np.int64), sum(map(num_bytes, kept))
    return TokenStore(np.concatenate([np.zeros(0, np.int32), *kept]), ends, size, whole.hexdigest())
