"""The state before the first step: drawn from the seed, read from a model, or some of both."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw import backends
from trainfw.adapters import with_magnitudes
from trainfw.data import Progress
from trainfw.errors import UserError, did_you_mean
from trainfw.parallel import Quantized, Rules, quantize
from trainfw.program.host import init_on_host
from trainfw.program.source import open_base
from trainfw.program.state import TrainState
from trainfw.recipe import Recipe

Tree = Any
"""A nested dict of arrays, or of what describes them."""


def initial_state(
    recipe: Recipe,
    abstract: TrainState,
    draw: Callable[[], tuple[Tree, Tree]],
    start: Callable[[Tree, Tree], TrainState],
    layer_order: Sequence[int],
    graphdef: Any,
    progress: Progress | None = None,
) -> TrainState:
    """The first state. What `draw` returns serves where `model.from` has nothing: adapters, or everything.

    Raises UserError where the model of `model.from` cannot be read or is of another shape.
    """
    if recipe.model.from_ is None:
        return _computed(lambda: start(*draw()), abstract)
    frozen = initial_frozen(recipe, abstract, draw, layer_order, progress)
    if recipe.adapter is None:
        params = _read(recipe, abstract.params, layer_order, progress)
    else:
        params = _computed(lambda: draw()[0], abstract.params)
        if recipe.adapter.kind == "dora":
            # Of the base as it is kept, which is what the update is added to.
            def magnitudes(params: Tree, frozen: Tree) -> Tree:
                model = nnx.merge(graphdef, nnx.State(params), nnx.State(frozen))
                with_magnitudes(model)
                return nnx.to_pure_dict(nnx.state(model, nnx.Param))

            params = jax.jit(magnitudes, out_shardings=_shardings(abstract.params))(params, frozen)
    return jax.jit(start, out_shardings=_shardings(abstract), donate_argnums=(0, 1))(params, frozen)


def initial_frozen(
    recipe: Recipe,
    abstract: TrainState,
    draw: Callable[[], tuple[Tree, Tree]],
    layer_order: Sequence[int],
    progress: Progress | None = None,
) -> Tree:
    """What does not learn, as it is kept: an empty dict but with an adapter."""
    if recipe.adapter is None:
        return {}
    if recipe.model.from_ is None:
        return _computed(lambda: draw()[1], abstract.frozen)
    return _read(recipe, abstract.frozen, layer_order, progress)


def _computed(compute: Callable[[], Any], abstract: Any) -> Any:
    shardings = _shardings(abstract)
    run = (
        init_on_host(compute, shardings) if backends.current().host_init else jax.jit(compute, out_shardings=shardings)
    )
    return run()


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _read(recipe: Recipe, abstract: Tree, layer_order: Sequence[int], progress: Progress | None) -> Tree:
    """The model of `model.from`, array by array: no more than one of them is ever there in another form."""
    with recipe.blamed("model.from"):
        base = open_base(recipe.model.from_)
        base.check(recipe.model)
        names = _names(abstract)
        leaves = []
        for number, (name, like) in enumerate(names, start=1):
            leaves.append(_stored(base.read, name, like, layer_order))
            if progress is not None:
                progress(f"reading {recipe.model.from_}, arrays", number, len(names))
    tree = jax.tree.structure(abstract, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return jax.tree.unflatten(tree, leaves)


def _stored(read: Callable[..., jax.Array], name: str, like: Any, layer_order: Sequence[int]) -> Any:
    if not isinstance(like, Quantized):
        return read(name, like, layer_order)
    wide = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.codes.sharding)
    precision, block = ("int8", 0) if like.low is None else ("nf4", like.shape[like.dim] // like.scales.shape[like.dim])
    return jax.jit(
        lambda weight: quantize(weight, precision, block=block, dim=like.dim),  # type: ignore[arg-type]
        out_shardings=_shardings(like),
        donate_argnums=0,
    )(read(name, wide, layer_order))


def _names(tree: Tree) -> list[tuple[str, Any]]:
    """(dotted name, leaf), a quantised weight as one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return [(".".join(str(key.key) for key in path), leaf) for path, leaf in leaves]


# --- How frozen weights are kept ------------------------------------------------------------------------------------


def as_kept(frozen: Tree, recipe: Recipe) -> Tree:
    """Frozen weights, f32, in the form in which they are kept: `adapter.base`. Raises UserError for a bad `exclude`."""
    adapter = recipe.adapter
    if adapter is None:
        return {}
    named = _names(frozen)
    dtype = jnp.dtype(adapter.base or recipe.train.compute_dtype) if not _quantised(recipe) else jnp.dtype("bfloat16")
    matrices = [name for name, _ in named if _is_matrix(name)]
    for pattern in adapter.exclude:
        if not any(_matches(name, pattern) for name in matrices):
            raise UserError(f"exclude: {pattern!r} matches none of the matrices{did_you_mean(pattern, matrices)}")

    def keep(name: str, weight: jax.Array) -> Any:
        if not _quantised(recipe) or name not in matrices or any(_matches(name, p) for p in adapter.exclude):
            return weight.astype(dtype)
        dim = -1 if name == "embedding.table" else -2
        try:
            return quantize(weight, adapter.base, block=adapter.block, dim=dim)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{error} (of {name}, {tuple(weight.shape)})") from None

    tree = jax.tree.structure(frozen)
    return jax.tree.unflatten(tree, [keep(name, weight) for name, weight in named])


def kept_shardings(variables: nnx.State, recipe: Recipe, rules: Rules) -> Tree:
    """Nested dict of the shardings of frozen weights as they are kept; of a `Quantized`, of each of its arrays."""
    flat = nnx.to_flat_state(variables)
    dense = nnx.to_pure_dict(nnx.from_flat_state([(path, variable.get_value()) for path, variable in flat]))
    axes = {".".join(map(str, path)): variable.get_metadata()["axes"] for path, variable in flat}
    kept = jax.eval_shape(lambda tree: as_kept(tree, recipe), dense)

    def sharding(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return rules.weight_sharding(name, leaf.shape, axes[name], "parameters")
        names = leaf.dims(axes[name])
        return jax.tree.map(
            lambda part, names: rules.weight_sharding(name, part.shape, names, "parameters"), leaf, names
        )

    tree = jax.tree.structure(kept, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return jax.tree.unflatten(tree, [sharding(name, leaf) for name, leaf in _names(kept)])


def count_weights(tree: Tree) -> int:
    """Weights of a tree, a quantised one counted as what it stands for."""
    return sum(math.prod(leaf.shape) for _, leaf in _names(tree))


def _quantised(recipe: Recipe) -> bool:
    return recipe.adapter is not None and recipe.adapter.base in ("int8", "nf4")


def _is_matrix(name: str) -> bool:
    return (name.endswith(".kernel") and not name.endswith("router.kernel")) or name == "embedding.table"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rpartition(".")[0], pattern)
