"""Places where the keys of a recipe were written, and values as errors show them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainfw.errors import short

Sources = dict[str, str]
"""Place where each dotted key was written: `file:line`, `command line`, or `overrides` of a call."""


COMMAND_LINE = "command line"
OVERRIDES = "overrides"
ARGUMENTS = "arguments"
_GIVEN = (COMMAND_LINE, OVERRIDES, ARGUMENTS)
"""Sources that a user gives beside the file: blamed before it."""


def where(key: str, sources: Sources, problem: str = "") -> str:
    """Return `file:line: ` of the key, or of the nearest section it is in, or of what is in it.

    What the command line, or overrides, say is blamed before what a file does: the key itself, what is in it, or a key
    that the problem names.
    """
    inside = [name for name in sources if name.startswith(f"{key}.")]
    written = key
    while written and written not in sources:
        written = written.rpartition(".")[0]
    found = sources[written] if written else sources[inside[0]] if inside else ""
    if found not in _GIVEN:
        given = [name for name, source in sources.items() if source in _GIVEN and name != "model"]
        named = next((name for name in given if name in inside or _names(problem, name, key)), None)
        found = found if named is None else f"{sources[named]} ({named})"
    return f"{found}: " if found else ""


def _names(problem: str, name: str, key: str) -> bool:
    """Tell whether a problem with `key` is said to be one with the key `name` too, or with the section it is in.

    Within one section, by its last part alone.
    """
    section, _, last = name.rpartition(".")
    said = {name, section if "." in section else name, last if section and key.startswith(f"{section}.") else name}
    return re.search(rf"(?<![\w.])(?:{'|'.join(map(re.escape, said))})(?!\w|\.\w)", problem) is not None


def show(value: object) -> str:
    return "null" if value is None else short(value, 60)


def leaves(tree: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
