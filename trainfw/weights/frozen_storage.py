"""Storage of frozen weights: in a float dtype, or quantised."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.errors import UserError, did_you_mean
from trainfw.parallel import SPLIT_RULES, Rules
from trainfw.quantization import Quantized, quantize
from trainfw.recipe import Recipe

Tree = Any
"""Nested dict of arrays, or of descriptions of arrays."""


def as_kept(frozen: Tree, recipe: Recipe) -> Tree:
    """Convert frozen weights, f32, to their storage: `adapter.base`, or else `train.compute_dtype`.

    Raises UserError for a pattern of `exclude` that matches nothing.
    """
    weights = named(frozen)
    matrices = [name for name, _ in weights if _is_matrix(name)]
    for pattern in () if recipe.adapter is None else recipe.adapter.exclude:
        if not any(_matches(name, pattern) for name in matrices):
            raise UserError(f"exclude: {pattern!r} matches none of the matrices{did_you_mean(pattern, matrices)}")
    return map_named(lambda name, weight: kept_weight(name, weight, recipe), frozen)


def kept_weight(name: str, weight: jax.Array, recipe: Recipe) -> jax.Array | Quantized:
    """Convert one frozen weight to its storage. Raises UserError where `adapter.block` does not divide it."""
    adapter = recipe.adapter
    if adapter is None:
        return weight.astype(recipe.train.compute_dtype)
    if adapter.base not in ("int8", "nf4"):
        return weight.astype(adapter.base or recipe.train.compute_dtype)
    if not _is_matrix(name) or any(_matches(name, pattern) for pattern in adapter.exclude):
        return weight.astype(jnp.bfloat16)
    dim = -1 if name == "embedding.table" else -2
    try:
        return quantize(weight, adapter.base, block=adapter.block, dim=dim)
    except UserError as error:
        raise UserError(f"{error} (of {name}, {tuple(weight.shape)})") from None


def kept_shardings(variables: nnx.State, recipe: Recipe, rules: Rules) -> Tree:
    """Return a nested dict of the shardings of stored frozen weights, for each array of a `Quantized`."""
    flat = nnx.to_flat_state(variables)
    dense = nnx.to_pure_dict(nnx.from_flat_state([(path, variable.get_value()) for path, variable in flat]))
    axes = {".".join(map(str, path)): variable.get_metadata()["axes"] for path, variable in flat}
    with recipe.blamed("adapter"):
        kept = jax.eval_shape(lambda tree: as_kept(tree, recipe), dense)

    def sharding(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return rules.weight_sharding(name, leaf.shape, axes[name], "parameters")
        scales, low, step = "scales", None, None
        if recipe.adapter is not None and leaf.low is not None:
            scales = f"scales (one for each adapter.block = {recipe.adapter.block})"
            low, step = f"{name}, low", f"{name}, step"
        titles = Quantized(f"{name}, codes", f"{name}, {scales}", low, step, dim=leaf.dim)  # type: ignore[arg-type]
        return jax.tree.map(
            lambda part, title, names: rules.weight_sharding(title, part.shape, names, "parameters"),
            leaf,
            titles,
            leaf.dims(axes[name], SPLIT_RULES),
        )

    tree = jax.tree.structure(kept, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    with recipe.blamed("parallel"):
        return jax.tree.unflatten(tree, [sharding(name, leaf) for name, leaf in named(kept)])


def count_weights(tree: Tree) -> int:
    """Count the weights of a tree; a quantised array counts with the shape that it stands for."""
    return sum(math.prod(leaf.shape) for _, leaf in named(tree))


def _is_matrix(name: str) -> bool:
    return (name.endswith(".kernel") and not name.endswith("router.kernel")) or name == "embedding.table"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rpartition(".")[0], pattern)


def named(tree: Tree) -> list[tuple[str, Any]]:
    """List (dotted name, leaf) of a tree; a quantised weight is one leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return [(".".join(str(key.key) for key in path), leaf) for path, leaf in leaves]


def map_named(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Return the tree of `function(dotted name, leaf)`; a quantised weight is one leaf."""
    structure = jax.tree.structure(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return jax.tree.unflatten(structure, [function(name, leaf) for name, leaf in named(tree)])
