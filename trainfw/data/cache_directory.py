"""Directories of the data cache: made once by one process, whole or not at all, and again where they are damaged."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from trainfw.data.config import DataConfig
from trainfw.data.locking import held
from trainfw.data.progress import Progress
from trainfw.errors import RunError, UserError, about
from trainfw.json_text import read_json
from trainfw.paths import cache_dir
from trainfw.unfinished import sync_tree, writing

T = TypeVar("T")
S = TypeVar("S")
Meta = dict[str, Any]
"""Record of what a directory holds, as JSON writes it."""


class CacheDirectory(abc.ABC, Generic[T, S]):
    """The directory of one fingerprint, which holds what is made of a source S, and is opened as T."""

    what: ClassVar[str]
    """Thing that is cached, in words."""

    def __init__(self, config: DataConfig, fingerprint: str, progress: Progress | None) -> None:
        self._config, self._fingerprint, self._progress = config, fingerprint, progress
        self._root = cache_root(config)
        self._directory = self._root / fingerprint
        self._mending = threading.RLock()
        self._digests: list[str] = []
        """Digests of the splits that were returned."""

    @abc.abstractmethod
    def _load(self, directory: Path, meta: Meta) -> tuple[T, list[str]]:
        """Open what `_build` wrote, and return it with the digests of its splits.

        Raises OSError, ValueError, KeyError or TypeError where it is damaged.
        """

    @abc.abstractmethod
    def _build(self, directory: Path, source: S) -> list[str]:
        """Write it, with its record (`write_meta`), and return the digests of its splits."""

    def _source_again(self) -> S:
        """Return the source, to make it again: what `prepared` was given."""
        return self._source

    def prepared(self, source: S) -> tuple[T, str]:
        """Open the cache, or make it first; return what it holds, and the damage for which it was made again.

        Raises UserError where it cannot be made.
        """
        self._source = source
        try:
            found, damage = self._open()
            if found is None:
                self._root.mkdir(parents=True, exist_ok=True)
                with self._lock():
                    found, damage = self._open()
                    if found is None:  # else it was made while this process waited
                        self._make(source)
                        found, new_damage = self._open()
            if found is None:
                raise OSError(f"it was just written, and is damaged: {new_damage}")
        except OSError as error:  # from the cache only: a source raises UserError
            problem = f"cannot write the {self.what} in {self._root}: {error.strerror or error}"
            raise UserError(f"{problem}; name another in data.cache_dir") from error
        data, self._digests = found
        return data, damage

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return held(self._root / f"{self._fingerprint}.lock", f"the {self.what}", self._progress)

    def _open(self) -> tuple[tuple[T, list[str]] | None, str]:
        """Return what `_load` does, None where not all of it is whole; and the damage in words, empty where none."""
        if not self._directory.exists():
            return None, ""
        try:
            meta: Meta = read_json(self._directory / "meta.json")
            if meta.pop("digest", None) != _digest(meta):
                raise ValueError(f"{self._directory / 'meta.json'} is not what was written")
            return self._load(self._directory, meta), ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, str(error)

    def _make(self, source: S) -> None:
        """Write the whole cache anew; the old one stays until the new one is on the disk.

        Raises UserError where its digests differ from those that were returned before.
        """
        with writing(self._directory, directory=True) as partial:
            with about("source"):
                digests = self._build(partial, source)
            if self._digests and digests != self._digests:
                raise UserError(f"what its source gives now is other data (digests {digests}, not {self._digests})")
            sync_tree(partial)
            shutil.rmtree(self._directory, ignore_errors=True)

    def _mend(self, problem: str, is_whole: Callable[[], bool]) -> None:
        """Make the cache again while it is in use, unless another thread or process has.

        Raises RunError where that fails, or would not give the same data.
        """
        log = logging.getLogger("trainfw")
        try:
            with self._mending, self._lock():
                if not is_whole():
                    log.warning("%s; making the cache again from its source", problem)
                    self._make(self._source_again())
                    log.warning("%s is whole again", self._directory)
        except (UserError, OSError) as error:
            raise RunError(f"{problem}, and cannot be made again: {error}") from error


def cache_root(config: DataConfig) -> Path:
    """Return the directory that holds the caches; each is a directory below it, by its fingerprint."""
    return Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else cache_dir()


def write_meta(directory: Path, meta: Meta) -> None:
    """Write the record of what a directory holds, and a digest of the record."""
    meta = json.loads(json.dumps(meta))  # with lists for tuples, as it will be read
    (directory / "meta.json").write_text(json.dumps({**meta, "digest": _digest(meta)}, indent=2))


def fingerprint_of(state: Sequence[object]) -> str:
    """Return a hash of values that JSON can write."""
    return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()


def is_held_out(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to validation. Only its text decides: copies are in one split."""
    return are_held_out(text.encode(), fraction)


def are_held_out(data: bytes, fraction: float) -> bool:
    """Tell whether the document of these bytes belongs to validation."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _digest(meta: dict[str, object]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()
