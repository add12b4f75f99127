"""The state before the first step: drawn from the seed, read from a model, or some of both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainfw import backends
from trainfw.adapters import config_targets
from trainfw.data import Progress
from trainfw.errors import UserError
from trainfw.program.models import ModelSet
from trainfw.program.state import TrainState
from trainfw.quantization import Quantized
from trainfw.recipe import Recipe
from trainfw.weights import Tree, kept_weight, named, open_base, read_adapter

_AT_ONCE = 8 * 2**30
"""Bytes of state that the host computes before it hands them on."""


def initial_state(
    models: ModelSet,
    abstract: TrainState,
    draw: Callable[[], tuple[Tree, Tree]],
    start: Callable[[Tree, Tree], TrainState],
    progress: Progress | None = None,
) -> TrainState:
    """The first state. What `draw` returns serves where `model.from` and `adapter.from` have nothing.

    Raises UserError where a model or an adapter cannot be read, or is of another shape.
    """
    recipe, layer_order = models.recipe, models.fit.layer_order
    if recipe.model.from_ is None and (recipe.adapter is None or recipe.adapter.from_ is None):
        return _computed(lambda: start(*draw()), abstract)
    frozen = initial_frozen(models, abstract, draw, progress)
    if recipe.adapter is None:
        params = _read(recipe, abstract.params, layer_order, progress)
    elif recipe.adapter.from_ is not None:
        arrays = _fitting_adapter(recipe, abstract.params)

        def placed(name: str, like: Any) -> jax.Array:
            value = arrays[name].astype(like.dtype)
            value = value[np.asarray(layer_order)] if name.startswith("layers.") else value
            return jax.make_array_from_callback(value.shape, like.sharding, value.__getitem__)

        leaves = [placed(*pair) for pair in named(abstract.params)]
        params = jax.tree.unflatten(jax.tree.structure(abstract.params), leaves)
    else:
        params = _computed(lambda: draw()[0], abstract.params)
        if recipe.adapter.kind == "dora":
            params = jax.jit(models.measured, out_shardings=shardings_of(abstract.params))(params, frozen)
    return jax.jit(start, out_shardings=shardings_of(abstract), donate_argnums=(0, 1))(params, frozen)


def initial_frozen(
    models: ModelSet,
    abstract: TrainState,
    draw: Callable[[], tuple[Tree, Tree]],
    progress: Progress | None = None,
) -> dict[str, Tree]:
    """Return what does not learn, as it is kept, by role."""
    recipe = models.recipe
    if not abstract.frozen or recipe.model.from_ is None:
        return _computed(lambda: draw()[1], abstract.frozen) if abstract.frozen else {}
    return {role: _read(recipe, tree, models.fit.layer_order, progress) for role, tree in abstract.frozen.items()}


def _computed(compute: Callable[[], Any], abstract: Any) -> Any:
    shardings, backend = shardings_of(abstract), backends.current()
    if backend.host_init:
        run = _init_on_host(compute, shardings, backend.init_options)
    else:
        run = jax.jit(compute, out_shardings=shardings, compiler_options=backend.init_options)
    computed = run()
    backends.release_freed_memory()  # of compiling
    return computed


def _init_on_host(
    init: Callable[[], TrainState], shardings: TrainState, compiler_options: dict[str, str]
) -> Callable[[], TrainState]:
    """`init` computed on the host's CPU and placed by `shardings`, for devices that cannot draw random numbers well.

    Every process computes the whole, about 8 GiB (or one array, if that is larger) at a time, and keeps its part.
    """
    abstract, tree = jax.tree.flatten(jax.eval_shape(init))
    parts: list[list[int]] = [[]]
    size = 0
    for i, leaf in enumerate(abstract):
        size += leaf.size * leaf.dtype.itemsize
        if size > _AT_ONCE and parts[-1]:
            parts.append([])
            size = leaf.size * leaf.dtype.itemsize
        parts[-1].append(i)

    def run() -> TrainState:
        leaves: list[Any] = list(jax.tree.leaves(shardings))
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for part in parts:
                # What a part does not return is not computed for it.
                compute = jax.jit(
                    lambda part=part: [jax.tree.leaves(init())[i] for i in part], compiler_options=compiler_options
                )
                for i, value in zip(part, map(np.asarray, compute()), strict=True):
                    leaves[i] = jax.make_array_from_callback(value.shape, leaves[i], value.__getitem__)
        return jax.tree.unflatten(tree, leaves)

    return run


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _read(recipe: Recipe, abstract: Tree, layer_order: Sequence[int], progress: Progress | None) -> Tree:
    """The model of `model.from`, array by array: no more than one of them is ever there in another form."""
    assert recipe.model.from_ is not None
    with recipe.blamed("model.from"):
        base = open_base(recipe.model.from_)
        names = named(abstract)
        leaves: list[Any] = []
        for number, (name, like) in enumerate(names, start=1):
            if isinstance(like, Quantized):
                wide = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.codes.sharding)
                keep = jax.jit(functools.partial(kept_weight, name, recipe=recipe), out_shardings=shardings_of(like))
                leaves.append(keep(base.read(name, wide, layer_order)))
            else:
                leaves.append(base.read(name, like, layer_order))
            if progress is not None:
                progress(f"reading {recipe.model.from_}, arrays", number, len(names))
    tree = jax.tree.structure(abstract, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return jax.tree.unflatten(tree, leaves)


def check_sources(recipe: Recipe, abstract: TrainState) -> None:
    """Raises UserError where `model.from` or `adapter.from` cannot be what this recipe starts from."""
    if recipe.model.from_ is not None:
        with recipe.blamed("model.from"):
            scales, theirs = recipe.model.update_scales, open_base(recipe.model.from_).config.update_scales
            if scales != theirs:
                how = "without muP" if theirs is None else "by muP, from another base width or without"
                raise UserError(
                    f"{recipe.model.from_}: was trained {how}, and its weights mean something else here; leave "
                    "model.mup and its base width as the weights have them"
                )
    if recipe.adapter is not None and recipe.adapter.from_ is not None:
        _fitting_adapter(recipe, abstract.params)


def _fitting_adapter(recipe: Recipe, abstract: Tree) -> dict[str, np.ndarray]:
    assert recipe.adapter is not None and recipe.adapter.from_ is not None  # noqa: PT018
    with recipe.blamed("adapter.from"):
        adapter = read_adapter(recipe.adapter.from_, recipe.model)
        if (adapter.base or adapter.copies) and recipe.model.from_ is not None:
            adapter.check_base(open_base(recipe.model.from_), recipe.model.from_)
        wanted = dict(named(abstract))
        for name in sorted(set(adapter.arrays) ^ set(wanted)):
            where = "in it, but not in" if name in adapter.arrays else "not in it, but in"
            config = adapter.config.model_dump(exclude_defaults=True)
            raise UserError(f"{adapter.path}: {name} is {where} this recipe's adapter; its config is {config}")
        for name, like in wanted.items():
            if (shape := adapter.arrays[name].shape) != like.shape:
                raise UserError(f"{adapter.path}: {name} has shape {shape}; this recipe's has {like.shape}")
        ours, theirs = (config_targets(config, recipe.model) for config in (recipe.adapter, adapter.config))
        for name, size in theirs.items():
            scales = recipe.adapter.scale(*ours[name]), adapter.config.scale(*size)
            if not math.isclose(*scales):
                raise UserError(
                    f"{adapter.path}: {name}: A B is scaled by {scales[1]:g} there, as of kind {adapter.config.kind}, "
                    f"rank {size[0]} and alpha {size[1]:g}; by {scales[0]:g} in this recipe's adapter"
                )
    return adapter.arrays
