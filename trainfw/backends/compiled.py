"""Cache of compiled programs on disk, so that a program is compiled once for all runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from pathlib import Path

import jax
from jax._src import compilation_cache  # its public face cannot be given another store
from jax._src.compilation_cache_interface import CacheInterface

from trainfw.paths import cache_dir
from trainfw.unfinished import writing

MOST_BYTES = 2**30
"""Bytes on disk at most; the entry that was not used for longest goes first. A training step takes some MB."""
SHORTEST_SECONDS = 0.1
"""Compile time below which nothing is kept: reading and checking an entry takes milliseconds, and there are many."""
_DIGEST_BYTES = 16


def keep_compiled() -> None:
    """Keep what jax compiles from now on in `cache_dir()`, unless its own settings say where, or that it is not to.

    Those are JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE (and the names in jax.config); a directory
    given there is jax's alone. Where the cache cannot be written nothing is kept.

    jax's key holds the program, its options, the versions and the CPU's features. Its own files are written in place
    and bare: one cut short is never replaced, one damaged may be run, and a limit to their size needs a lock.
    `Executables` has none of this.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"] or settings["jax_compilation_cache_dir"] is not None:
        return
    directory = cache_dir() / "compiled"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies in it is run
    except OSError:
        return
    if not os.access(directory, os.W_OK):
        return
    theirs, ours = compilation_cache.get_file_cache, str(directory)
    compilation_cache.get_file_cache = lambda path: (Executables(directory), path) if path == ours else theirs(path)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)


def keep_nothing() -> None:
    """Turn jax's cache of compiled programs off, whatever asked for it: for Neuron, where it ends programs.

    (jax 0.9.2 with libneuronxla 3.0.3854 dies with "No program shape found", measured by others on inf2.) A directory
    that was asked for is named in a warning.
    """
    if (directory := jax.config.values["jax_compilation_cache_dir"]) is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        warnings.warn(
            f"jax_compilation_cache_dir = {directory}: is not used, for JAX's cache of compiled programs ends them on "
            "Neuron; NEURON_COMPILE_CACHE_URL names the compiler's own",
            stacklevel=2,
        )
    if jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or it goes by the answer of the first time it asked


class Executables(CacheInterface):
    """Entries by key, each a file with a checksum, written whole or not at all; any number of processes share them."""

    def __init__(self, directory: Path, most_bytes: int = MOST_BYTES):
        self._path = directory  # jax reads it
        self._most_bytes = most_bytes

    def get(self, key: str) -> bytes | None:
        """Read an entry; None where there is none, or it is damaged, which is then removed."""
        file = self._file(key)
        try:
            data = file.read_bytes()
            value = data[_DIGEST_BYTES:]
            if data[:_DIGEST_BYTES] != _digest(value):
                file.unlink(missing_ok=True)
                return None
            os.utime(file)  # used last
        except OSError:
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Write an entry. Where the disk is full the run goes on without it, with a warning."""
        try:
            with writing(self._file(key)) as partial:
                partial.write_bytes(_digest(value) + value)
            self._trim()
        except OSError as error:
            warnings.warn(
                f"what was compiled is not kept in {self._path}: {error.strerror}; XDG_CACHE_HOME names another place",
                stacklevel=1,  # said once
            )

    def _file(self, key: str) -> Path:
        return self._path / f"{key}.executable"

    def _trim(self) -> None:
        found = []
        for entry in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):  # another process trims too
                if entry.is_file():
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_DIGEST_BYTES).digest()
