"""Recipes loaded: a file, what it extends, overrides, and what its weights say of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from trainfw import yaml_text
from trainfw.checkpoint import saved_recipe
from trainfw.config import name_problem
from trainfw.errors import UserError
from trainfw.interop import part_of, read_model_config
from trainfw.models import DEFAULT_FAMILY, DiTConfig, FamilyConfig, load_family
from trainfw.paths import path_text, resolve_path
from trainfw.recipe.files import (
    bundled_recipes,
    check_sections,
    extended,
    find_recipe,
    merge,
    read,
    without_model,
    without_other_source,
)
from trainfw.recipe.problems import describe
from trainfw.recipe.recipe import Recipe
from trainfw.recipe.sources import ARGUMENTS, OVERRIDES, Sources, leaves, show, where

_WHOLE_MODEL = ("model.family", "model.preset", "model.from")
"""Keys that say what all of the model is."""
_FREE_TEXT = ("data.system_prompt", "train.sample_prompt")
_MOST_PROBLEMS = 20
"""Problems told at once; to find the nearest key takes a while."""

RecipeLike: TypeAlias = Recipe | str | os.PathLike[str] | Mapping[str, Any]
"""A recipe, or what `load_recipe` makes one of."""


def load_recipe(
    path: RecipeLike, overrides: Sequence[str] | Mapping[str, object] = (), *, written: str = OVERRIDES
) -> Recipe:
    """Load a recipe file (or a bundled recipe by name, or a file's keys as a dict), what it extends, and overrides.

    Args:
        path: a file, the name of a bundled recipe, a run's directory, the keys of a file as a dict, or a Recipe.
        overrides: `["train.steps=50"]`, each value as YAML, or values by key, `{"train.steps": 50}` or nested.
        written: where errors say that the overrides were written.

    Raises UserError naming file, line, key, value, what was expected and the nearest valid key.
    """
    if isinstance(path, Recipe):
        if isinstance(overrides, Sequence | Mapping) and not overrides:
            return path
        tree, sources, path = path.model_dump(), dict(path._sources), "recipe"
    elif isinstance(path, Mapping):
        given, path = dict(path), "recipe"
        tree, sources = extended(given, {key: path for key, _ in leaves(given)}, Path(), ())
    elif isinstance(path, str | os.PathLike):
        file = find_recipe(path)
        saved = saved_recipe(file)
        tree, sources = read(file, ()) if saved is None else (saved, {})
    else:
        expected = "the path of a file, a bundled recipe's name, a dict or a trainfw.Recipe"
        raise UserError(f"recipe = {show(path)}: expected {expected}")
    # The family, the preset or the weights first: they replace the inherited model, which other overrides then refine.
    replaced = ""
    for key, value in sorted(_by_key(overrides, written), key=lambda item: item[0] not in _WHOLE_MODEL):
        if len(key) > yaml_text.MOST_KEY or key.count(".") >= yaml_text.MOST_DEPTH:
            raise UserError(f"{written}: {show(key)}: is too long for a key")
        if key in _WHOLE_MODEL and replaced != "model.family" and (key, value) != ("model.family", _family(tree)):
            replaced = key
            tree = _without_tokenizer_of_model(tree) | {"model": {}}
            sources = without_model(sources) | {"model": written}  # what the preset says, too
        if not key.startswith("data.source") or sources.get("data.mixture") != written:
            tree, sources = without_other_source(tree, sources, _set({}, key.split("."), value))
        tree = _set(tree, key.split("."), value)
        sources = {k: v for k, v in sources.items() if not k.startswith(f"{key}.")} | {key: written}
        check_sections(tree, sources)
    return _validate(tree, sources, str(path))


def _family(tree: dict[str, Any]) -> str:
    model = tree.get("model")
    family = model.get("family") if isinstance(model, dict) else None
    return family if isinstance(family, str) else DEFAULT_FAMILY


def load_recipe_for(
    path: RecipeLike, hardware: str | None, count: int | None = None, lnc: int | None = None, sdk: str | None = None
) -> Recipe:
    """Load a recipe for its own hardware, or for what the arguments of a call name in its place."""
    keys = {"topology": hardware, "count": count, "lnc": lnc, "sdk": sdk}
    if hardware is not None and count is None:
        keys["count"] = 1
    chosen = {f"hardware.{key}": value for key, value in keys.items() if value is not None}
    return load_recipe(path, chosen, written=ARGUMENTS)


def override_keys(overrides: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The dotted keys of overrides. Raises UserError as `load_recipe` does."""
    return [key for key, _ in _by_key(overrides, OVERRIDES)]


def _by_key(overrides: Sequence[str] | Mapping[str, object], written: str) -> Iterator[tuple[str, object]]:
    """List overrides as (dotted key, value)."""
    if isinstance(overrides, Mapping):
        for key, value in leaves(dict(overrides)):
            if not all(key.split(".")):
                raise UserError(f"{written}: {show(key)}: expected a key, such as 'train.steps'")
            yield key, value
        return
    if not isinstance(overrides, list | tuple) or not all(isinstance(text, str) for text in overrides):
        raise UserError(
            f"overrides = {show(overrides)}: expected a list of key=value, such as ['train.steps=50'], or a dict, such "
            "as {'train.steps': 50}"
        )
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not all(key.split(".")):
            raise UserError(f"{written}: {override!r}: expected key=value, such as train.steps=50")
        yield key, yaml_text.load(text, f"{written}: {key}", lines=False)


def refuse_recipe(path: str | os.PathLike[str]) -> None:
    """Raise UserError for a recipe, or the name of a run under runs/, where a run or a model is expected."""
    text = path_text(path)
    if Path(text, "recipe.yaml").is_file() or (Path(text).exists() and not text.endswith((".yaml", ".yml"))):
        return
    run = Path("runs", text)
    if (run / "recipe.yaml").is_file():
        raise UserError(f"{path}: no such file or directory; did you mean {str(run)!r}?")
    if text not in bundled_recipes() and not Path(text).is_file():
        return
    run = Path("runs", load_recipe(text).name)
    trained = (run / "recipe.yaml").is_file()
    then = f"did you mean {str(run)!r}?" if trained else f"it has not been trained here: trainfw train {text}"
    raise UserError(f"{path}: is a recipe, where a run or a model is expected; {then}")


def _without_tokenizer_of_model(tree: dict[str, object]) -> dict[str, object]:
    """Drop the tokenizer that came with `model.from`, since another model comes with its own."""
    model, data = tree.get("model"), tree.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict) or model.get("from") is None:
        return tree
    tokenizer = data.get("tokenizer")
    if not isinstance(tokenizer, dict) or tokenizer.get("path") != model["from"]:
        return tree
    return {**tree, "data": {key: value for key, value in data.items() if key != "tokenizer"}}


def _set(tree: object, path: list[str], value: object) -> Any:
    """Return `tree` with the value at `path` replaced, whatever was there."""
    first, *rest = path
    if isinstance(tree, list) and first.isdigit() and int(first) < len(tree):
        at = int(first)
        item = {key: old for key, old in tree[at].items() if key != ".".join(rest)} if rest else value  # dotted there
        return [*tree[:at], _set(item, rest, value) if rest else value, *tree[at + 1 :]]
    tree = tree if isinstance(tree, dict) else {}
    return {**tree, first: _set(tree.get(first), rest, value) if rest else value}


def _validate(tree: dict[str, object], sources: Sources, file: str) -> Recipe:
    for key, value in leaves(tree):
        for text in _texts(value):
            # All but free text is a name, a pattern or a path.
            problem = None if key in _FREE_TEXT else name_problem(text) or name_problem(key)
            if "\0" in text:
                problem = "holds a NUL character"
            elif key in _FREE_TEXT and any("\ud800" <= character <= "\udfff" for character in text):
                problem = "is not Unicode: it holds half a character"
            if problem:
                raise UserError(f"{where(key, sources)}{show(key)[1:-1]} = {show(text)}: {problem}")
    family = _family(tree)
    try:
        load_family(family)
    except UserError:  # said below, with its line
        family = DEFAULT_FAMILY
    else:
        tree = _from_adapter(_from_weights(tree, sources), sources)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        if any(e["loc"] == ("model", "preset") for e in errors):  # then what it should have filled in is not missing
            errors = [e for e in errors if not (e["loc"][0] == "model" and e["type"] == "missing")]
        problems = list(dict.fromkeys(describe(e, sources, file, family) for e in errors[:_MOST_PROBLEMS]))
        if len(errors) > _MOST_PROBLEMS:
            problems.append(f"and {len(errors) - _MOST_PROBLEMS:,} more")
        raise UserError("\n".join(problems)) from None
    recipe._sources.update(sources)
    return recipe


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _texts(each)


def _from_weights(tree: dict[str, object], sources: Sources) -> dict[str, object]:
    """Read the fields of the model and the tokenizer that `model.from` stands for, where they are not written out."""
    model, data = tree.get("model"), tree.get("data")
    source = model.get("from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(source, str):
        return tree
    if model.get("preset") is not None:
        raise UserError(f"{where('model.from', sources)}model.from = {source!r}: says all that model.preset says")
    config = load_family(_family(tree)).config
    required = {name for name, field in config.model_fields.items() if field.is_required()}
    if not required <= set(model):
        try:
            source = _part_of(source, model.get("family"))
            fields = _fields_of(source, model.get("family"))
        except UserError as error:
            raise UserError(f"{where('model.from', sources)}model.from: {error}") from error
        # Dispatch and the like are not the weights': field by field.
        tree = {**tree, "model": merge(fields, {**model, "from": source})}
    tokens = load_family(_family(tree)).reads == "tokens"
    if tokens and isinstance(data, dict) and "tokenizer" not in data:
        tree = {**tree, "data": {**data, "tokenizer": {"name": "file", "path": source}}}
    return tree


def _from_adapter(tree: dict[str, object], sources: Sources) -> dict[str, object]:
    """Read the fields that `adapter.from` stands for, where none of an adapter's shape is written out."""
    adapter = tree.get("adapter")
    source = adapter.get("from") if isinstance(adapter, dict) else None
    if not isinstance(adapter, dict) or not isinstance(source, str) or {"rank", "targets"} & set(adapter):
        return tree
    try:
        return {**tree, "adapter": {**_adapter_of(source, tree.get("model")), **adapter}}
    except UserError as error:
        raise UserError(f"{where('adapter.from', sources)}adapter.from: {error}") from error


def _part_of(source: str, family: str | None) -> str:
    """Return a path; of a pipeline of diffusers, that of the one model which the family names."""
    whole = resolve_path(source)
    part = part_of(whole, family)
    return source if part == whole else os.path.join(source, part.name)


def _fields_of(source: str, family: str | None) -> dict[str, object]:
    """Read the fields of the model at a path: a run's, or those of weights."""
    refuse_recipe(source)
    run = resolve_path(source) / "recipe.yaml"
    config: FamilyConfig = load_recipe(run).model if run.is_file() else read_model_config(source)
    if config.family != (family or config.family):
        raise UserError(f"{source}: is a model of family {config.family!r}, and model.family is {family!r}")
    named = {} if config.family == DEFAULT_FAMILY else {"family": config.family}
    return {**named, **config.model_dump(exclude={"preset", "from_"}, exclude_defaults=True)}


def _adapter_of(source: str, model: object) -> dict[str, object]:
    """Read the fields of the adapter at a path: a run's, or one in PEFT's or, of a `model`, diffusers' form."""
    refuse_recipe(source)
    if not resolve_path(source).exists():
        raise UserError(
            f"{source}: no such directory; expected a run of an adapter, or one in PEFT's or diffusers' form"
        )
    run = resolve_path(source) / "recipe.yaml"
    if not run.is_file():
        from trainfw.interop import is_lora, lora_fields, peft_fields

        if not is_lora(run.parent):
            return peft_fields(run.parent)
        try:
            return lora_fields(run.parent, DiTConfig.model_validate(model))
        except ValidationError:
            raise UserError(f"{source}: is of a diffusion transformer, which this model is not") from None
    config = load_recipe(run).adapter
    if config is None:
        raise UserError(f"{source}: is a run that trained all weights, not an adapter")
    return config.model_dump(exclude={"from_"}, exclude_defaults=True)
