"""Problems of a recipe in words: the key, where it was written, the value, what was expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from trainfw.config import Config
from trainfw.data import MixtureSource
from trainfw.errors import did_you_mean, nearest
from trainfw.models import DEFAULT_FAMILY
from trainfw.names import KEYS, SECTIONS, VALUES
from trainfw.recipe.files import section_of
from trainfw.recipe.recipe import keys, keys_of
from trainfw.recipe.sources import Sources, show, where
from trainfw.recipe.stage_config import ANNEAL, StageConfig


def describe(error: Any, sources: Sources, file: str, family: str = DEFAULT_FAMILY) -> str:
    """Say what pydantic found; keys of `model` are those of `family`."""
    kind, value = error["type"], error["input"]
    path = [str(part) for part in error["loc"] if part != ANNEAL]
    if kind == "combination" and error["ctx"]["field"]:
        path.append(error["ctx"]["field"])
    # A field that takes several types is followed by their names.
    if kind != "extra_forbidden":
        path = [part for part in path if not re.fullmatch(r"str|bool|int|float|list\[str\]|literal\[.*\]", part)]
    elif "." not in path[-1]:
        while isinstance(value, dict) and len(value) == 1:  # of an unknown section, the key in it
            (name, value), *_ = value.items()
            path.append(str(name))
    key = ".".join(path)
    at = where(key, sources, error["msg"] if kind == "combination" else "") or f"{file}: "
    match kind:
        case "extra_forbidden" if "." in path[-1]:
            section, _, rest = path[-1].partition(".")
            return f"{at}{key}: unknown key; in a file, write it as a section, {section}: {{{rest}: ...}}"
        case "extra_forbidden":
            meant = nearest_key(key, family) if (inner := _repeated(error["loc"])) is None else inner
            return f"{at}{key} = {show(value)}: unknown key{meant}"
        case "missing":
            return f"{at}{key}: is required{nearest_key(key) if not key else ''}"
        case "combination":
            return f"{at}{key}: {error['msg']}"
        case "literal_error":
            choices = [part.strip("' ") for part in re.split(r", | or ", error["ctx"]["expected"])]
            if type(None) in get_args(keys(family).get(key)):
                choices.append("null")
            known, near = VALUES.get(str(value).lower()), did_you_mean(str(value), choices)
            hint = f"; did you mean {known!r}?" if known in choices else near if "mean" in near else ""
            return f"{at}{key} = {show(value)}: expected one of {', '.join(choices)}{hint}"
        case "string_pattern_mismatch" if key in _IN_WORDS:
            return f"{at}{key} = {show(value)}: expected {_IN_WORDS[key]}"
        case "model_type" | "model_attributes_type":
            return f"{at}{key} = {show(value)}: {section_of(path[-1] if path else file, value)}"
        case _:
            expected = re.sub(r"^(Input should be|Value should|String should( have)?) ", "", error["msg"])
            hint = _meant(kind, value)
            return f"{at}{key} = {show(value)}: expected {expected[:1].lower()}{expected[1:]}{hint}"


def _repeated(loc: Sequence[int | str]) -> str | None:
    """Suggest a key of one of several sections (stages, a mixture's sources); None for a place in none of them."""
    kinds: dict[str, type[Config]] = {"stages": StageConfig, "data.mixture": MixtureSource}
    path = [str(part) for part in loc]
    for place, kind in kinds.items():
        depth = place.count(".") + 1
        if ".".join(path[:depth]) == place and len(path) > depth + 1:
            inside = ".".join(path[depth + 1 : -1])
            known = [
                (name, of) for name, of in keys_of(kind, DEFAULT_FAMILY) if name.startswith(f"{inside}." * bool(inside))
            ]
            known = known or [*keys_of(kind, DEFAULT_FAMILY)]
            last = {name.rpartition(".")[2]: name for name, _ in known}
            near = nearest(path[-1], last)
            if near is None and (ours := our_key(path[-1])) is not None:
                near = ours.split(" ")[0].rpartition(".")[2]
            meant = last.get(near or "")
            if meant is None:
                return f"; one of: {', '.join(name for name, _ in known if '.' not in name)}"
            return f"; did you mean {'.'.join([*path[: depth + 1], meant])!r}?"
    return None


_IN_WORDS = {
    "name": "letters, digits, '.', '_' and '-', with a letter or a digit first",
    "data.date": "a day, YYYY-MM-DD",
}
"""Patterns of keys in words."""


def _meant(kind: str, value: object) -> str:
    """Guess the value that one of the wrong type was meant to be, where it can be read."""
    text = str(value).strip().lower()
    if kind.startswith("bool"):
        words = {"true": ("true", "yes", "on", "1", "y"), "false": ("false", "no", "off", "0", "n")}
        return next((f"; did you mean {word}?" for word, same in words.items() if text in same), "")
    found = re.fullmatch(r"([-+]?\d[\d_,]*(?:\.\d+)?(?:e[-+]?\d+)?) ?([kmb]?)", text)
    if not kind.startswith(("int", "float")) or isinstance(value, bool) or found is None:
        return ""
    number = float(re.sub("[_,]", "", found[1])) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2]]
    if kind.startswith("float"):
        return f"; did you mean {number:g}?"
    return f"; did you mean {number:.0f}?" if number.is_integer() else ""


def our_key(key: str, family: str = DEFAULT_FAMILY) -> str | None:
    """Find the key that says what `key` does elsewhere: in another section, or in another trainer. May add a remark."""
    section, _, last = key.rpartition(".")
    name = last.lower().replace("-", "_")
    same = [valid for valid in keys(family) if valid.rpartition(".")[2] == name]
    return (
        KEYS.get(f"{section}.{name}")
        or next((valid for valid in same if section and valid == f"{_our_section(section)}.{name}"), None)
        or KEYS.get(name)
        or (None if section else SECTIONS.get(name))
        or next(iter(same), None)
    )


def nearest_key(key: str, family: str = DEFAULT_FAMILY) -> str:
    """Suggest `"; did you mean 'x'?"` for an unknown key: the one that says it here, or the nearest by its letters."""
    section, _, last = key.rpartition(".")
    ours = _our_section(section)
    siblings = {valid.rpartition(".")[2]: valid for valid in keys(family) if valid.rpartition(".")[0] == ours}
    anywhere = {valid.rpartition(".")[2]: valid for valid in reversed(keys(family))} | KEYS
    # Of another section, a key has to be nearly the same.
    near = nearest(last, siblings, likeness=0.75 if section and not ours else 0.6) or ""
    far = nearest(last, anywhere, likeness=0.75) or ""
    known = our_key(key, family) or siblings.get(near) or anywhere.get(far)
    if known is None:
        return did_you_mean(last, siblings) if ours or not section else ""
    found, _, note = known.partition(" ")
    return f"; did you mean {found!r}?{f' {note}' if note else ''}"


def _our_section(section: str) -> str:
    """Find the section that `section` is, or is like."""
    sections = {valid.rpartition(".")[0] for valid in keys()}
    section = SECTIONS.get(section, section)
    return section if section in sections else nearest(section, sections - {""}) or ""
