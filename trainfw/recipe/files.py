"""Recipe files: found, read and merged over those they extend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from trainfw import yaml_text
from trainfw.errors import UserError, did_you_mean
from trainfw.models import DEFAULT_FAMILY
from trainfw.names import FIRST
from trainfw.paths import check_file
from trainfw.recipe.recipe import keys
from trainfw.recipe.sources import Sources, show, where

_MOST_EXTENDED = 32
"""Recipes in a chain of `extends`."""


def bundled_recipes() -> dict[str, Path]:
    """Find the bundled recipes: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    directory = installed if installed.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """Find `path` itself, a bundled recipe of that name, or the recipe of a run directory."""
    if not str(path):
        raise UserError("recipe: the path is empty")
    file, bundled = Path(path), bundled_recipes()
    if (file / "recipe.yaml").is_file():
        return file / "recipe.yaml"
    if file.is_file():
        return file
    if str(path) in bundled:
        return bundled[str(path)]
    if file.is_dir():
        raise UserError(f"{path}: is a directory without a recipe.yaml")
    if file.exists():
        check_file(file)  # says what it is
    beside = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
    raise UserError(f"{path}: no such recipe{did_you_mean(str(path), [*beside, *bundled])}")


def read(file: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Sources]:
    """Merge a file's keys over those it extends, and record where each was written."""
    chain = (*chain, file.resolve())
    if len(chain) > _MOST_EXTENDED:
        raise UserError(f"{file}: is extended by {len(chain) - 1} recipes, one by the other; {_MOST_EXTENDED} at most")
    node = yaml_text.compose(yaml_text.read_text(file), file)
    if node is None:
        raise UserError(f"{file}: is empty; expected keys such as model: {{preset: tiny}}")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file}:{node.start_mark.line + 1}: expected `key: value` lines at the top level")
    sources: Sources = {}
    tree = _construct(node, "", file, sources)
    check_sections(tree, sources)
    return extended(tree, sources, file.parent, chain)


def extended(
    tree: dict[str, object], sources: Sources, directory: Path, chain: tuple[Path, ...]
) -> tuple[dict[str, object], Sources]:
    """Merge keys over those they extend, and record where each was written."""
    if "extends" not in tree:
        return tree, sources
    base = tree.pop("extends")
    written = sources.pop("extends", "recipe")
    if not isinstance(base, str):
        raise UserError(f"{written}: extends = {show(base)}: expected the path of another recipe")
    base_file, bundled = directory / base, bundled_recipes()
    if not base_file.is_file():
        base_file = bundled.get(base.removesuffix(".yaml"), base_file)
    if not base_file.is_file():
        if base_file.exists():
            raise UserError(f"{written}: extends = {base!r}: is not a regular file")
        beside = [p.name for p in directory.glob("*.yaml")]
        raise UserError(f"{written}: extends = {base!r}: no such file{did_you_mean(base, [*beside, *bundled])}")
    if base_file.resolve() in chain:
        cycle = " -> ".join(p.name for p in (*chain[chain.index(base_file.resolve()) :], base_file))
        raise UserError(f"{written}: extends = {base!r}: the chain comes back to itself: {cycle}")
    base_tree, base_sources = read(base_file, chain)
    if replaces_model(base_tree.get("model"), tree.get("model")):
        base_sources = without_model(base_sources)
    if "stages" in tree:
        base_sources = {key: place for key, place in base_sources.items() if not key.startswith("stages.")}
    base_tree, base_sources = without_other_source(base_tree, base_sources, tree)
    return merge(base_tree, tree), base_sources | sources


def _construct(node: yaml.MappingNode, prefix: str, file: Path, sources: Sources) -> dict[str, object]:
    """Read a mapping's values, recording the line of every key and refusing a key written twice."""
    values: dict[str, Any] = {}
    loader = yaml_text.Loader("")
    for key_node, value_node in node.value:
        line = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{line}: expected a plain key")
        name = key_node.value
        if len(name) > yaml_text.MOST_KEY:
            raise UserError(f"{line}: a key of {len(name):,} characters; {yaml_text.MOST_KEY:,} at most")
        dotted = f"{prefix}{name}"
        if name in values:
            raise UserError(f"{line}: {dotted}: is written twice (first at {sources[dotted]})")
        sources[dotted] = line
        try:
            if isinstance(value_node, yaml.MappingNode):
                values[name] = _construct(value_node, f"{dotted}.", file, sources)
            elif isinstance(value_node, yaml.SequenceNode) and _of_mappings(value_node):
                for i, item in enumerate(value_node.value):
                    sources[f"{dotted}.{i}"] = f"{file}:{item.start_mark.line + 1}"
                values[name] = [
                    _construct(item, f"{dotted}.{i}.", file, sources) for i, item in enumerate(value_node.value)
                ]
            else:
                values[name] = loader.construct_object(value_node, deep=True)
        except yaml_text.MALFORMED as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{line}: {dotted}: {yaml_text.problem_of(error)}") from None
    return values


def _of_mappings(node: yaml.SequenceNode) -> bool:
    return bool(node.value) and all(isinstance(item, yaml.MappingNode) for item in node.value)


def check_sections(tree: dict[str, object], sources: Sources) -> None:
    """Refuse a value in a section's place, which another file or override would replace without a word."""
    for section in {key.rpartition(".")[0] for key in keys()} - {""}:
        value: Any = tree
        for part in section.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            expected = section_of(section.rpartition(".")[2], value)
            raise UserError(f"{where(section, sources)}{section} = {show(value)}: {expected}")


def section_of(section: str, value: object) -> str:
    """Say what is expected where `value` was given."""
    inside = f"{FIRST[section]}: {value:.60}" if isinstance(value, str) and section in FIRST else "key: value"
    return f"expected a section, `{section}: {{{inside}}}`"


def replaces_model(base: Any, model: Any) -> bool:
    """Tell whether a section `model` says all that there is to say, so that nothing of `base` is left."""
    if not isinstance(model, dict):
        return False
    before = base.get("family", DEFAULT_FAMILY) if isinstance(base, dict) else DEFAULT_FAMILY
    return bool({"preset", "from"} & set(model)) or model.get("family", before) != before


def without_other_source(
    base: dict[str, Any], sources: Sources, over: dict[str, Any]
) -> tuple[dict[str, Any], Sources]:
    """Return a base's keys and their places without `data.source` where a mixture is named over it, and the reverse."""
    below, above = base.get("data"), over.get("data")
    if not isinstance(below, dict) or not isinstance(above, dict):
        return base, sources
    for named, dropped in (("mixture", "source"), ("source", "mixture")):
        if above.get(named) is not None and dropped not in above and dropped in below:
            base = {**base, "data": {key: value for key, value in below.items() if key != dropped}}
            gone = f"data.{dropped}"
            sources = {key: place for key, place in sources.items() if key != gone and not key.startswith(f"{gone}.")}
    return base, sources


def without_model(sources: Sources) -> Sources:
    return {key: place for key, place in sources.items() if not key.startswith("model.")}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = base | over
    for key, value in over.items():
        replaced = key == "model" and replaces_model(base.get(key), value)
        if isinstance(value, dict) and isinstance(base.get(key), dict) and not replaced:
            merged[key] = merge(base[key], value)
    return merged
