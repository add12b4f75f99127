"""Files of a source: the inputs that a path, a directory or a glob stands for, and the files that are skipped."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from trainfw.data.arrow import SAVED
from trainfw.data.compressed import SUFFIXES, File
from trainfw.data.config import STDLIB, TASK_SOURCES, TOPICS
from trainfw.data.readers import Reader
from trainfw.data.remote import StoreBlocks, cached_of_hub, hub_cache_place, is_remote, list_remote
from trainfw.errors import UserError, did_you_mean

_SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}
_SHOWN = 12
"""Most kinds of skipped files that are listed."""
_Pattern = tuple[str, ...]
"""Parts of a glob."""


class Input(NamedTuple):
    """A file, or the directory of a saved dataset, and how to read it."""

    path: File
    name: str
    """Path within the source."""
    read: Reader

    @property
    def local(self) -> Path:
        """Path of what is on this machine, as whatever is not of a store."""
        assert isinstance(self.path, Path)
        return self.path


class Skipped:
    """Counts of the files that were found and are not read, by kind, with an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, example: str = "") -> None:
        self.counts[kind] += 1
        self._first.setdefault(kind, f" ({example})" if example else "")

    def __str__(self) -> str:
        """Return a line such as `3 files skipped: 2 .csv, 1 suffixless (README)`; empty where there are none."""
        total = self.counts.total()
        shown = [
            f"{n:,} {_several(kind) if n > 1 else kind}{self._first[kind]}"
            for kind, n in self.counts.most_common(_SHOWN)
        ]
        more = ", ..." if len(self.counts) > _SHOWN else ""
        return f"{total:,} file{'s' * (total > 1)} skipped: {', '.join(shown)}{more}" if total else ""


def _several(kind: str) -> str:
    kind = re.sub("^directory", "directories", kind)
    return f"{kind}s" if kind in ("dangling link", *_SPECIAL.values()) else kind


class Finder:
    """Search for inputs of some kinds, which counts the other files that it finds in `skipped`.

    A directory stands for all files below it. Links are followed, hidden files (`.git`, say) are left out, and a file
    that is reached twice is read once: a glob and a name that overlap do not ask to learn a file twice.
    """

    def __init__(self, readers: Mapping[str, Reader], why_not: Callable[[File, str], str | None]):
        """Begin a search.

        Args:
            readers: the readers of the kinds to read.
            why_not: called with the path and the kind of a file that a glob matched; returns why it is not read, or
                None where it is.
        """
        self.skipped = Skipped()
        self._readers, self._kinds = readers, [kind for kind in readers if kind != SAVED]
        self._why_not = why_not
        self._reached: set[str] = set()

    def find(self, name: str) -> list[Input]:
        """Return the inputs that `name` stands for, in order. Raises UserError where it stands for none."""
        if is_remote(name):
            found = self._remote(name)
            if not isinstance(found, str):
                return self._new(found)
            name = found
        path = Path(os.path.expanduser(name))
        if not name:
            raise UserError("source: a name is empty; expected the path of a file or a directory")
        if is_saved_dataset(path):
            inputs = [Input(path, path.name, self._readers[SAVED])]
        elif os.path.isdir(path):
            inputs = self._all(path, ("**", "*"), name)
        elif os.path.lexists(path):
            if odd := _odd(path):
                leads = f" to {odd[1]}" if odd[1] else ""
                raise UserError(f"source {name!r} is a {odd[0]}{leads}; expected a file or a directory")
            inputs = [self._file(path)]
        elif glob.has_magic(name):
            root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            inputs = self._all(root, path.relative_to(root).parts, name)
        else:
            try:
                os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except (OSError, ValueError) as error:  # a name too long, no right to look, a NUL in it
                raise UserError(f"source {name!r}: {getattr(error, 'strerror', None) or error}") from None
            siblings = [str(sibling) for sibling in path.parent.iterdir()] if os.path.isdir(path.parent) else []
            hint = did_you_mean(str(path), [STDLIB, TOPICS, *TASK_SOURCES, *siblings])
            raise UserError(f"source {name!r} does not exist (seen from {Path.cwd()}){hint}")
        return self._new(inputs)

    def _new(self, inputs: list[Input]) -> list[Input]:
        """Return the inputs that were not reached before."""
        new = []
        for one in inputs:
            real = os.path.realpath(one.path) if isinstance(one.path, Path) else one.path.url
            if real in self._reached:
                self.skipped.add("reached twice", one.name)
            else:
                self._reached.add(real)
                new.append(one)
        return new

    def _file(self, path: File) -> Input:
        """Return a file that was named. Raises UserError where its kind is not read."""
        kind, suffix = file_kind(path)
        if kind not in self._kinds:
            also = "" if ".txt" in self._kinds else " as rows of examples"
            hint = did_you_mean(suffix, self._kinds)
            raise UserError(f"{path}: cannot read a {suffix or 'suffixless'} file{also}{hint}")
        return Input(path, path.name, self._readers[kind])

    def _remote(self, name: str) -> list[Input] | str:
        """Return the inputs at a URL; for the Hugging Face hub, where it cannot be asked, the path in its cache."""
        try:
            found, alone = list_remote(name, StoreBlocks())
        except UserError as error:
            if not name.startswith("hf://"):
                raise
            if (place := cached_of_hub(name)) is None:
                cache = hub_cache_place()
                raise UserError(f"{error}; nor is all of it in the hub's cache on this machine ({cache})") from None
            return place
        if alone:
            return [self._file(found[0][0])]
        if saved := [shown for file, shown in found if file.name in _OF_SAVED]:
            raise UserError(
                f"source {name!r}: {saved[0]} is of a dataset that `save_to_disk` wrote, which is read on this machine "
                "alone; copy it here, or write it as Parquet"
            )
        return self._of_kinds(found, name)

    def _all(self, root: Path, pattern: _Pattern, name: str) -> list[Input]:
        paths = self._walk(root, {pattern}, {os.path.realpath(root)})
        every = pattern == ("**", "*")
        return self._of_kinds(((path, path.relative_to(root).as_posix()) for path in paths), name, every=every)

    def _of_kinds(self, found: Iterable[tuple[File, str]], name: str, *, every: bool = False) -> list[Input]:
        """Return those of the files, each with its path within the source, that can be read.

        Raises UserError where none can; `every` file of a directory was looked at.
        """
        before, inputs = self.skipped.counts.copy(), []
        for path, shown in found:
            kind, suffix = file_kind(path)
            if isinstance(path, Path) and os.path.isdir(path):
                inputs.append(Input(path, shown, self._readers[SAVED]))
            elif isinstance(path, Path) and (odd := _odd(path)):
                self.skipped.add(odd[0], f"{shown} -> {odd[1]}" if odd[1] else shown)
            elif kind not in self._kinds:
                self.skipped.add(suffix or "suffixless", "" if suffix else shown)
            elif reason := self._why_not(path, kind):
                self.skipped.add(f"{suffix} without rows", f"{shown}: {reason}")
            else:
                inputs.append(Input(path, shown, self._readers[kind]))
        if not inputs:
            others = sorted(self.skipped.counts - before)
            if not others and not every:
                seen_from = "" if is_remote(name) else f" (seen from {Path.cwd()})"
                raise UserError(f"source {name!r} matches no file{seen_from}")
            raise UserError(
                f"source {name!r}: no file that can be read (one of {', '.join(self._kinds)}) and no saved dataset; "
                f"found {', '.join(others[:8]) or 'nothing'}"
            )
        return inputs

    def _walk(self, directory: Path, patterns: set[_Pattern], entered: set[str]) -> Iterator[Path]:
        """Yield the paths below `directory` that match one of the patterns, sorted part by part."""
        try:
            names = sorted(os.listdir(directory))
        except OSError as error:
            if os.path.isdir(directory):
                self.skipped.add("directory that cannot be read", f"{directory}: {error.strerror}")
            return
        for name in names:
            path, left = directory / name, _after(patterns, name)
            matches, deeper = () in left, left - {()}
            if matches and (not os.path.isdir(path) or is_saved_dataset(path)):
                yield path
            elif not left or not os.path.isdir(path):
                continue
            elif not deeper:
                self.skipped.add("directory", name)
            elif (real := os.path.realpath(path)) in entered:
                self.skipped.add("directory reached twice", name)
            else:
                entered.add(real)
                yield from self._walk(path, deeper, entered)


def file_kind(path: File) -> tuple[str, str]:
    """Return a file's suffix in lower case, without that of a compression and with it."""
    name = path.name.lower()
    compression = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    kind = Path(name.removesuffix(compression)).suffix
    return kind, kind + compression


_OF_SAVED = ("dataset_dict.json", "state.json")


def is_saved_dataset(path: Path) -> bool:
    """Tell whether `save_to_disk` wrote this directory."""
    return any(os.path.isfile(path / name) for name in _OF_SAVED)


def _odd(path: Path) -> tuple[str, str] | None:
    """Say what a path is that is no regular file, and where it leads: reading it would wait for ever, or fail."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return ("dangling link", os.readlink(path)) if os.path.islink(path) else (error.strerror or "missing file", "")
    return None if stat.S_ISREG(mode) else (_SPECIAL.get(stat.S_IFMT(mode), "special file"), "")


def _after(patterns: set[_Pattern], name: str) -> set[_Pattern]:
    """Return the rest of each pattern below a `name` that its first part matches; () for a pattern that ends there."""
    left: set[_Pattern] = set()
    hidden = name.startswith(".")
    for pattern in patterns:
        while pattern and pattern[0] == "**":
            if not hidden:
                left |= {pattern, pattern[1:]} if len(pattern) == 1 else {pattern}
            pattern = pattern[1:]
        if pattern and fnmatch.fnmatchcase(name, pattern[0]) and (not hidden or pattern[0].startswith(".")):
            left.add(pattern[1:])
    return left
