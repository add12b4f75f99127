"""Runs of a sweep: every combination of the values of some keys."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainfw import yaml_text
from trainfw.errors import UserError, expect, short
from trainfw.recipe import COMMAND_LINE, Recipe, RecipeLike, load_recipe
from trainfw.training import RunDirectory, check_inputs
from trainfw.unfinished import write_text

MOST_RUNS = 1000
"""Runs of a sweep at most: more are a slip of the pen."""
RECIPES = "recipes"
"""Directory of a sweep that holds a recipe for each run."""
_PAIRS = {"[": "]", "{": "}"}
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|\s+|.""", re.DOTALL)
"""A quoted text, white space, or one character."""
_LONGEST = 100
"""Characters of a run's name."""

Values = Mapping[str, Sequence[object]]
"""Values of each key that is swept."""


@dataclass(frozen=True)
class SweepRun:
    """One combination of values, the recipe that it makes, and the run's directory."""

    name: str
    """Values of the run as a name, such as `learning_rate=0.01,num_layers=4`."""
    values: Mapping[str, object]
    recipe: Recipe
    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path.parent / RECIPES / f"{self.name}.yaml"

    def write_recipe(self) -> None:
        """Write the resolved recipe where the run's process reads it."""
        self.recipe_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe_file, self.recipe.to_yaml())


def read_grid(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[object]]]:
    """Split overrides of a command line into those with one value, and the values of each key that has several.

    Raises UserError where a key is given twice, or a value is empty.
    """
    fixed: list[str] = []
    swept: dict[str, list[object]] = {}
    keys = [override.partition("=")[0] for override in overrides]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"{COMMAND_LINE}: {twice}: is given twice; give its values at once, {twice}=A,B")
    for key, override in zip(keys, overrides, strict=True):
        texts = list(split_values(override.partition("=")[2]))
        if len(texts) == 1:
            fixed.append(override)
            continue
        if "" in map(str.strip, texts):
            raise UserError(f"{COMMAND_LINE}: {override}: a value between commas is empty; expected {key}=A,B")
        swept[key] = [yaml_text.load(text, f"{COMMAND_LINE}: {key}", lines=False) for text in texts]
    return fixed, swept


def split_values(text: str) -> Iterator[str]:
    """Split at commas that are in no brackets and no quotes of YAML."""
    start, at, closing, before = 0, 0, [""], ","
    while found := _TOKEN.match(text, at):
        token, at = found[0], found.end()
        if token[0] in "'\"" and before not in ",:[{":  # an apostrophe
            token, at = token[0], found.start() + 1
        if token in _PAIRS:
            closing.append(_PAIRS[token])
        elif token == closing[-1]:
            closing.pop()
        elif token == "," and len(closing) == 1:
            yield text[start : at - 1]
            start = at
        before = before if token.isspace() else token
    yield text[start:]


def make_runs(
    recipe: RecipeLike,
    values: Values,
    out: Path | None = None,
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    written: str = COMMAND_LINE,
) -> list[SweepRun]:
    """Make the runs of all combinations, the last key's values varying fastest. Nothing is written.

    Args:
        out: directory of the runs; None: `runs/NAME-sweep`.
        overrides: what all runs have in common.
        written: where errors say that the values were written.

    Raises UserError for values that make no recipe, for two that make the same, and for a directory of `out` that holds
    another run than such a one.
    """
    if not values:
        raise UserError("no key has several values: expected KEY=A,B, such as optimizer.learning_rate=1e-3,3e-3")
    for key, given in values.items():
        expect(key, given, isinstance(given, list | tuple) and len(given) > 0, "a list of values")
        if twice := [value for i, value in enumerate(given) if any(_same(value, other) for other in given[:i])]:
            raise UserError(f"{written}: {key}: {short(twice[0])} is given twice")
    if (count := math.prod(map(len, values.values()))) > MOST_RUNS:
        raise UserError(f"{written}: these values make {count:,} runs; expected {MOST_RUNS:,} at most")
    runs: list[SweepRun] = []
    names: dict[str, str] = {}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        made = _recipe(recipe, overrides, chosen, written)
        place = out or Path("runs") / f"{made.name}-sweep"
        name = run_name(chosen)
        if (other := names.setdefault(made.to_yaml(), name)) != name:
            raise UserError(f"{written}: {other} and {name} make the same recipe")
        if any(run.name.lower() == name.lower() for run in runs):  # some file systems do not tell them apart
            name = f"{name[: _LONGEST - 6]}-{len(runs) + 1}"
        runs.append(SweepRun(name, chosen, made, place / name))
    return runs


def _recipe(
    recipe: RecipeLike, overrides: Sequence[str] | Mapping[str, object], chosen: Mapping[str, object], written: str
) -> Recipe:
    """Load a recipe with these values; what it derives, such as a head's size, follows from them."""
    if isinstance(overrides, Mapping):
        return load_recipe(recipe, {**overrides, **chosen}, written=written)
    texts = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    return load_recipe(recipe, [*overrides, *texts], written=written)


def check_runs(runs: Sequence[SweepRun]) -> None:
    """Raise UserError where a run cannot start, or go on, as its recipe says. Reads only."""
    for run in runs:
        check_compared(run.recipe)
        if run.recipe.checkpoint.directory is not None:
            raise run.recipe.error(
                "checkpoint.directory", "is one place, which the runs of a sweep cannot share: set it to null"
            )
        check_inputs(run.recipe)
        RunDirectory(run.path).check(run.recipe, "auto")


def check_compared(recipe: Recipe) -> None:
    """Raise UserError where a run has no validation loss at its end."""
    if recipe.train.validation_batches == 0:
        raise recipe.error(
            "train.validation_batches", "a sweep compares validation losses: expected null, or a number above 0"
        )


def run_name(values: Mapping[str, object]) -> str:
    """Name a run by its values, in whatever order: by the last part of their keys, where that tells them apart."""
    words = [f"{name}={_plain(value)}" for name, value in zip(short_keys(list(values)), values.values(), strict=True)]
    return ",".join(sorted(words))[:_LONGEST]


def short_keys(keys: Sequence[str]) -> list[str]:
    """Return the last parts of keys, or whole keys where two of them end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return [key if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)]


def value_text(value: object) -> str:
    """Write a value as YAML does on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _plain(value: object) -> str:
    """Write a value with letters that a file's name may have."""
    return re.sub(r"[^\w.+-]+", "-", value_text(value)).strip("-") or "empty"


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
