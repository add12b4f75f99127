"""Sources: where documents come from. Everything is read as a stream; no source holds its text in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainfw.data.config import STDLIB, TASK_SOURCES, DataConfig
from trainfw.data.files import Finder
from trainfw.data.readers import AND, READERS, ROW_READERS, Reader, read_python, read_text, why_no_rows
from trainfw.data.stdlib import read_task
from trainfw.errors import UserError

STDLIB_TESTS = {"test", "tests", "idle_test"}
STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages"),  # not the standard library
    *STDLIB_TESTS,  # repetitive, and some distributions leave them out
    *("encodings", "pydoc_data"),  # generated tables
}
STDLIB_BUILT_HERE = ("_sysconfigdata", "config-")
"""What these hold depends on how and where this Python was built."""

CONVERSATION = ("tools", "system", "functions", "documents", "chat_template_kwargs")
"""Keys beside a chat's messages that change what a template writes; all others are taken for facts about the row."""

ROW_SWITCHES = ("weight", "train")
"""Keys by which a row says that it is not to be learnt, or not as much as others."""


class Document(NamedTuple):
    """One text. `id` says where it was read: a file, with its line or row where a file holds many."""

    id: str
    text: str


class Row(NamedTuple):
    """One row of a source of examples: an object with the keys asked for, where it has them."""

    id: str
    value: Any


@dataclass(frozen=True)
class Input:
    """A file (or a saved dataset's directory) and how to read it; `name` is its path within its source."""

    path: Path
    name: str
    read: Reader


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, from a list of inputs."""

    inputs: tuple[Input, ...]
    text_field: str
    identity: str | None = None
    """What the source is, where that is known better than by the times of its files (`python-stdlib`)."""
    max_characters: int | None = None
    """Of a built-in task: the longest prompt taken."""
    skipped: str = ""
    """What was found and is not read, by kind, in words; empty where there is nothing."""

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in order. Raises UserError where an input cannot be read."""
        return (Document(*one) for one in self._read() if one[1])

    def rows(self) -> Iterator[Row]:
        """Every row, in order; of a built-in task, each prompt once. Raises UserError where an input cannot be read."""
        seen: set[bytes] = set()
        for id_, value in self._read():
            if self.identity is not None:
                prompt = value["prompt"]
                digest = hashlib.blake2b(prompt.encode(errors="replace"), digest_size=16).digest()
                if digest in seen or len(prompt) > (self.max_characters or len(prompt)):
                    continue
                seen.add(digest)
            yield Row(id_, value)

    def _read(self) -> Iterator[tuple[str, Any]]:
        for item in self.inputs:
            with _readable(item.path):
                for place, value in item.read(item.path, self.text_field):
                    yield item.name + place, value

    def fingerprint(self) -> str:
        """Changes when an input does: the path, size, time, first and last bytes of each file; reads no more of it."""
        state: list[Any] = [self.identity, self.text_field]
        if self.max_characters is not None:
            state.append(self.max_characters)
        for item in self.inputs:
            with _readable(item.path):
                for path in sorted(item.path.rglob("*")) if item.path.is_dir() else [item.path]:
                    stat = path.stat()
                    known = () if self.identity else (str(path.resolve()), stat.st_mtime_ns, _ends(path, stat.st_size))
                    state.append((item.name, path.name, stat.st_size, *known))
        return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()

    def num_documents(self) -> int | None:
        """How many documents there are, where that is one per file; None where it takes reading."""
        return len(self.inputs) if all(item.read in (read_text, read_python) for item in self.inputs) else None


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names. Raises UserError where it matches nothing that can be read."""
    names = [config.source] if isinstance(config.source, str) else config.source
    if not names:
        raise UserError("source is an empty list: expected at least one path")
    if names[0] in TASK_SOURCES:
        return _python_stdlib(names[0], config.max_characters)
    if config.format == "text":
        field, readers = config.text_field, READERS
    else:
        fields = {
            "chat": (config.messages_field, *CONVERSATION),
            "prompt_completion": (config.prompt_field, config.completion_field),
            "preferences": (config.chosen_field, config.rejected_field, config.prompt_field, *CONVERSATION),
        }[config.format]
        field, readers = AND.join(dict.fromkeys((*fields, *ROW_SWITCHES))), ROW_READERS
    if names == [STDLIB]:
        if config.format != "text":
            raise UserError(f"source: {STDLIB} is text; for {config.format}, name JSONL or Parquet files")
        return _python_stdlib()
    if STDLIB in names:
        raise UserError(f"source: {STDLIB} cannot be mixed with other sources")
    finder = Finder(readers, lambda path, kind: why_no_rows(path, field) if kind == ".json" else None)
    inputs = [Input(path, name, readers[kind]) for one in names for path, name, kind in finder.find(one)]
    return Source(tuple(inputs), field, skipped=str(finder.skipped))


def _python_stdlib(task: str | None = None, max_characters: int | None = None) -> Source:
    """The library's files, or the pairs of a task made of them; those of its own tests too, where installed."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = STDLIB_EXCLUDED if task is None else STDLIB_EXCLUDED - STDLIB_TESTS
    read = read_python if task is None else _TASK_READERS[task]
    inputs = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - excluded)
        for path in sorted(Path(directory, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(STDLIB_BUILT_HERE):
                inputs.append(Input(path, name, read))
    if not inputs:
        raise UserError(f"source {STDLIB}: this Python keeps no .py files in {root}; name files of your own")
    return Source(tuple(inputs), "", f"{task or STDLIB} {sys.version}", max_characters)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _ends(path: Path, size: int, block: int = 2**16) -> str:
    """A hash of a file's first and last block: times and sizes alone agree where images or archives set them."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        first = file.read(block)
        file.seek(max(size - block, 0))
        return hashlib.blake2b(first + file.read(block), digest_size=16).hexdigest()


_TASK_READERS: dict[str, Reader] = {
    name: functools.partial(lambda task, path, _field: read_task(path, task), name) for name in TASK_SOURCES
}
