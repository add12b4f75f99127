"""Contents that a disk may have after a power loss, by the journal of what was done to it (`journal.c`).

As ext4 and XFS have it: changes of names (files made, renamed, deleted, emptied) reach the disk in order, and an fsync
of anything takes all earlier ones along; of a file's own bytes only its own fsync is a promise. Of what was written
since, there may be all, nothing, the first part, or zeros.
"""

from __future__ import annotations

import bisect
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    kind: str
    """c(reated), t(runcated), w(ritten), r(enamed), l(inked), u(nlinked), m(ade a directory), s(ynced), ! (a mark)."""
    offset: int
    path: str
    other: str
    data: bytes


def read_journal(file: Path) -> list[Change]:
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        kind, offset, *lengths = struct.unpack_from("<cqqqq", data, at)
        at += 33
        parts = []
        for length in lengths:
            parts.append(data[at : at + length])
            at += length
        found.append(Change(kind.decode(), offset, parts[0].decode(), parts[1].decode(), parts[2]))
    return found


@dataclass(eq=False)
class File:
    log: list[tuple[int, Change]] = field(default_factory=list)
    """Its writes and truncations, by their number in the journal."""
    synced: int = -1

    def content(self, names_until: int, rng: random.Random | None) -> bytes:
        """Return what the disk may hold of it; without a `rng`, all that was written."""
        fate = rng.choice(["all", "nothing", "part", "zeros"]) if rng else "all"
        later = sum(1 for number, change in self.log if number > self.synced and change.kind == "w")
        allowed = rng.randrange(later) if rng and fate == "part" and later else later
        out = bytearray()
        for number, change in self.log:
            durable = number <= self.synced
            if change.kind == "t":
                if number > names_until:
                    break  # and what was written since went where nothing leads
                del out[change.offset :]
                out += bytes(change.offset - len(out))
                continue
            data = change.data
            if not durable:
                if fate == "nothing":
                    continue
                if fate == "zeros":
                    data = bytes(len(data))
                if fate == "part":
                    if not allowed:
                        data = data[: rng.randrange(len(data))] if rng else data
                    allowed -= 1
                    if allowed < -1:
                        continue
            out += bytes(max(change.offset - len(out), 0))
            out[change.offset : change.offset + len(data)] = data
        return bytes(out)


Tree = dict[str, "File | Tree"]


class Disk:
    """A journal's disk at a moment.

    Args:
        changes: of the journal, those that were made before the power went.
        rng: decides what of them reached the disk; without one, all did.
    """

    def __init__(self, root: str, changes: Sequence[Change], rng: random.Random | None = None):
        self._root, self._rng = root, rng
        last = max((number for number, change in enumerate(changes) if change.kind == "s"), default=-1)
        self._names_until = rng.choice([last, len(changes) - 1, rng.randint(last, len(changes) - 1)]) if rng else 2**63
        names: Tree = {}
        self._names: Tree = {}
        for number, change in enumerate(changes):
            self._apply(names, number, change)
            if number == self._names_until:
                self._names = _copied(names)
        if self._names_until >= len(changes):
            self._names = names

    def _apply(self, names: Tree, number: int, change: Change) -> None:
        if change.kind in "!":
            return
        folder, name = self._place(names, change.path)
        match change.kind:
            case "m":
                folder[name] = {}
            case "c":
                folder[name] = File()
            case "w" | "t" | "s":
                file = folder.get(name) if name else names
                if isinstance(file, File):
                    file.synced = number if change.kind == "s" else file.synced
                    if change.kind != "s":
                        file.log.append((number, change))
            case "u":
                folder.pop(name, None)
            case "r" | "l":
                target, other = self._place(names, change.other)
                target[other] = folder[name]
                if change.kind == "r" and (target, other) != (folder, name):
                    del folder[name]

    def _place(self, names: Tree, path: str) -> tuple[Tree, str]:
        *folders, name = path[len(self._root) :].strip("/").split("/")
        for folder in folders:
            inner = names[folder]
            assert isinstance(inner, dict), path
            names = inner
        return names, name

    def files(self) -> Iterator[tuple[str, bytes | None]]:
        """(path, content) in order; None for a directory."""
        yield from self._files(self._names, "")

    def _files(self, names: Tree, before: str) -> Iterator[tuple[str, bytes | None]]:
        for name, node in sorted(names.items()):
            if isinstance(node, File):
                yield before + name, node.content(self._names_until, self._rng)
            else:
                yield before + name, None
                yield from self._files(node, f"{before}{name}/")

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        for name, content in self.files():
            if content is None:
                (directory / name).mkdir()
            else:
                (directory / name).write_bytes(content)


def _copied(names: Tree) -> Tree:
    return {name: node if isinstance(node, File) else _copied(node) for name, node in names.items()}


def marks_before(changes: Sequence[Change], moment: int) -> list[str]:
    """Return what the program had said of itself before that moment."""
    marks = [number for number, change in enumerate(changes) if change.kind == "!"]
    return [changes[number].path for number in marks[: bisect.bisect_left(marks, moment)]]
