"""YAML that people write, read within limits; and written so that every reader takes it for the same.

Plain scalars are those of YAML 1.2: `1e-4` is a number, and `no` and `on` are words.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from trainfw.errors import UserError
from trainfw.paths import check_file
from trainfw.utf8 import decode_utf8

MOST_BYTES = 2**19
"""Limit, in bytes, of a file, or of a value on the command line. The longest bundled recipe, resolved, has 5 KiB."""
MOST_NODES = 10_000
"""Keys and values, those that aliases repeat included: a quarter of a second to read."""
MOST_SCALAR = 2**16
"""Characters of one value."""
MOST_KEY = 1024
MOST_DEPTH = 64
QUOTED = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
"""Characters that YAML's versions read differently, or not at all, unless they are escaped."""


class _Refused(yaml.MarkedYAMLError):
    """Text that may be YAML, and cannot be meant."""

    def __init__(self, problem: str, mark: Any):
        super().__init__(problem=problem, problem_mark=mark)


class Loader(yaml.SafeLoader):
    """Counts as it composes, and stops at the limits. Nothing is repeated for an alias before it is counted."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, self._depth = self._count, self._depth + 1
        event: Any = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if self._depth > MOST_DEPTH:
            raise _Refused(f"is nested too deeply: more than {MOST_DEPTH} levels", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MOST_SCALAR:
            raise _Refused(f"has a value of {len(event.value):,} characters; {MOST_SCALAR:,} at most", event.start_mark)
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise _Refused(f"*{event.anchor} contains itself", event.start_mark)
        self._count += self._sizes[id(node)] if alias else 1
        if self._count > MOST_NODES:
            repeated = ", what aliases repeat included" if self._sizes and alias else ""
            raise _Refused(f"has more than {MOST_NODES:,} keys and values{repeated}", event.start_mark)
        self._sizes[id(node)] = self._count - before
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Refused(f"the key {key.value!r:.60} is written twice", key.start_mark)
                if len(key.value) > MOST_KEY:
                    raise _Refused(f"a key of {len(key.value):,} characters; {MOST_KEY:,} at most", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read as the same string."""

    def ignore_aliases(self, data: object) -> bool:
        return True


Loader.yaml_implicit_resolvers = {}
Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers
_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?[0-9][0-9_]*",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_TAG = "tag:yaml.org,2002:"
for _tag, _pattern in _SCALARS.items():
    Loader.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), None)


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    """Read an integer as decimal; YAML 1.1 reads 010 as octal."""
    text = node.value
    try:
        return int(text.replace("_", ""))
    except ValueError:
        problem = f"a number of {len(text):,} digits" if text.isdigit() else f"{text!r:.60} is no number"
        raise _Refused(problem, node.start_mark) from None


Loader.add_constructor(_TAG + "int", _construct_int)


Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TAG + "str", text, style='"' if QUOTED.search(text) else None)
)

MALFORMED = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError)
"""Errors that PyYAML raises for text that is no YAML, and for tags whose values are not what they say."""


def problem_of(error: Exception) -> str:
    """Say what is wrong with the text, for an error of `MALFORMED`."""
    if isinstance(error, _Refused):
        return str(error.problem)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    return f"not valid YAML: {problem}"


def read_text(file: Path) -> str:
    """Read the text of a file that people write. Raises UserError, without waiting, for what is none or too long."""
    check_file(file)
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    _check_length(len(data), str(file))
    return decode_utf8(data, file).replace("\r\n", "\n").replace("\r", "\n")


def compose(text: str, where: str | Path) -> yaml.Node | None:
    """Compose the text's nodes, with lines and columns; None where it has none. Raises UserError with the line."""
    _check_length(len(text), str(where))
    try:
        return yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}{_line(text, error)}: {problem_of(error)}") from None


def load(text: str, where: str | Path, *, lines: bool = True) -> Any:
    """Read the text's value. Raises UserError, with the line where `lines`."""
    _check_length(len(text), str(where))
    try:
        return yaml.load(text, Loader)
    except MALFORMED as error:
        raise UserError(f"{where}{_line(text, error) if lines else ''}: {problem_of(error)}") from None


def dump(tree: object) -> str:
    """Write the tree as YAML that `load` takes back to the same."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _check_length(length: int, where: str) -> None:
    if length > MOST_BYTES:
        raise UserError(f"{where}: is longer than {MOST_BYTES // 1024} KiB, the most that is read as YAML")


def _line(text: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f":{mark.line + 1}"
    position = getattr(error, "position", None)  # of a character that may not be
    return "" if position is None else f":{text.count(chr(10), 0, position) + 1}"
