"""Sources of documents and of rows. All are read as streams: none holds its text in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainfw.data.compressed import SUFFIXES, File
from trainfw.data.config import STDLIB, TASK_SOURCES, TOPICS, DataConfig
from trainfw.data.files import Finder, Input
from trainfw.data.readers import READERS, ROW_READERS, Columns, Reader, read_python, read_text, why_no_rows
from trainfw.data.remote import RemoteFile
from trainfw.data.stdlib import read_task, read_topics
from trainfw.errors import UserError

STDLIB_TESTS = {"test", "tests", "idle_test"}
STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages"),  # not the standard library
    *STDLIB_TESTS,  # repetitive, and some distributions leave them out
    *("encodings", "pydoc_data"),  # generated tables
}
STDLIB_BUILT_HERE = ("_sysconfigdata", "config-")
"""Prefixes of files whose text depends on how and where this Python was built."""

CONVERSATION = ("tools", "system", "functions", "documents", "chat_template_kwargs")
"""Keys beside a chat's messages that change the template's output; all other keys only describe the row."""

ROW_SWITCHES = ("weight", "train")
"""Keys by which a row may ask not to be learnt, or with another weight."""


class Document(NamedTuple):
    """One text. `id` names the place where it was read: a file, with the line or row if the file holds several."""

    id: str
    text: str


class Row(NamedTuple):
    """One row of a source of examples. `value` has those of the source's columns that the row has."""

    id: str
    value: Any


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, from a list of inputs."""

    inputs: tuple[Input, ...]
    columns: Columns
    identity: str | None = None
    """Name and version of a built-in source, which identify it better than the times of its files."""
    max_characters: int | None = None
    """Characters of the longest prompt that is taken from a built-in task."""
    skipped: str = ""
    """Files that were found and are not read, by kind, in words; empty if there are none."""

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty, in order. Raises UserError where an input cannot be read."""
        return (Document(*one) for one in self._read() if one[1])

    def rows(self) -> Iterator[Row]:
        """Yield every row, in order; each prompt of a built-in task only once.

        Raises UserError where an input cannot be read.
        """
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
            with readable(item.path):
                for place, value in item.read(item.path, self.columns):
                    yield item.name + place, value

    def fingerprint(self) -> str:
        """Return a hash of each file's path, size, time, first and last block. Reads no more than these blocks.

        Of files of a store it is the URL, the size and the store's tag (ETag), and nothing is read.
        """
        state: list[Any] = [self.identity, "\0".join(self.columns)]
        if self.max_characters is not None:
            state.append(self.max_characters)
        for item in self.inputs:
            if isinstance(item.path, RemoteFile):
                state.append([item.name, item.path.url, item.path.num_bytes, item.path.mark])
                continue
            with readable(item.path):
                for path in sorted(item.path.rglob("*")) if item.path.is_dir() else [item.path]:
                    stat = path.stat()
                    state.append([item.name, path.name, stat.st_size])
                    if self.identity is None:
                        state[-1] += [str(path.resolve()), stat.st_mtime_ns, ends_of(path, stat.st_size)]
        return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()

    def num_documents(self) -> int | None:
        """Count the documents if each file is one; None if that takes reading."""
        return len(self.inputs) if all(item.read in (read_text, read_python) for item in self.inputs) else None

    def num_bytes(self) -> int | None:
        """Count the bytes of all text if each file is one document as it is; None if that takes reading."""
        plain = all(not item.name.lower().endswith(SUFFIXES) for item in self.inputs)
        if not self.inputs or not plain or self.num_documents() is None:
            return None
        with contextlib.suppress(OSError):  # who reads them will say
            paths = [item.path for item in self.inputs]
            return sum(path.stat().st_size if isinstance(path, Path) else path.num_bytes for path in paths)
        return None


def open_source(config: DataConfig) -> Source:
    """Open the source that `config.source` names. Raises UserError where nothing that can be read matches."""
    names = [config.source] if isinstance(config.source, str) else config.source
    if not names:
        raise UserError("source is an empty list: expected at least one path")
    if names[0] in TASK_SOURCES:
        return _python_stdlib(names[0], config.max_characters)
    columns, readers = columns_of(config), READERS if config.format == "text" else ROW_READERS
    for built_in, open_built_in in ((STDLIB, _python_stdlib), (TOPICS, _python_topics)):
        if built_in in names and len(names) > 1:
            raise UserError(f"source: {built_in} is not one of a list; name both in data.mixture")
        if built_in in names:
            if config.format != "text":
                raise UserError(f"source: {built_in} is text; for {config.format}, name JSONL or Parquet files")
            return open_built_in()
    finder = Finder(readers, lambda path, kind: why_no_rows(path, columns) if kind == ".json" else None)
    inputs = [one for name in names for one in finder.find(name)]
    return Source(tuple(inputs), columns, skipped=str(finder.skipped))


def columns_of(config: DataConfig) -> Columns:
    """Return the columns that are read of a row: the text of a document, or the parts of an example."""
    if config.format == "text":
        return (config.text_field,)
    if config.format == "images":
        raise UserError("pictures are read from files; name them in source")
    fields = {
        "chat": (config.messages_field, *CONVERSATION),
        "prompt_completion": (config.prompt_field, config.completion_field),
        "preferences": (config.chosen_field, config.rejected_field, config.prompt_field, *CONVERSATION),
    }[config.format]
    return tuple(dict.fromkeys((*fields, *ROW_SWITCHES)))


def _python_stdlib(task: str | None = None, max_characters: int | None = None) -> Source:
    """Return the library's files as documents, or as the rows of a task, which its own tests (if installed) add to."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded, name = (STDLIB_EXCLUDED, STDLIB) if task is None else (STDLIB_EXCLUDED - STDLIB_TESTS, task)
    read: Reader = read_python if task is None else lambda path, _: read_task(path, name)
    inputs = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - excluded)
        for path in sorted(Path(directory, file) for file in files if file.endswith(".py")):
            place = path.relative_to(root).as_posix()
            if not place.startswith(STDLIB_BUILT_HERE):
                inputs.append(Input(path, place, read))
    if not inputs:
        raise UserError(f"source {STDLIB}: this Python keeps no .py files in {root}; name files of your own")
    return Source(tuple(inputs), (), f"{name} {sys.version}", max_characters)


def _python_topics() -> Source:
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if not path.is_file():
        raise UserError(f"source {TOPICS}: this Python keeps no {path}; name files of your own")
    return Source((Input(path, "topics", lambda file, _: read_topics(Path(str(file)))),), (), f"{TOPICS} {sys.version}")


@contextlib.contextmanager
def readable(path: File) -> Iterator[None]:
    """Raise UserError where the system does not let a file be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def ends_of(path: Path, size: int, block: int = 2**16) -> str:
    """Return a hash of a file's first and last block: images and archives may set equal times and sizes."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        first = file.read(block)
        file.seek(max(size - block, 0))
        return hashlib.blake2b(first + file.read(block), digest_size=16).hexdigest()
