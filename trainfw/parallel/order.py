"""Layers that are stacked in another order than the model runs them in (see `stage_order`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

Tree = TypeVar("Tree")


def reorder_layers(tree: Tree, held: Sequence[int], wanted: Sequence[int], *, donate: bool = False) -> Tree:
    """Reorder the stacked layers of a pytree of arrays from the order `held` to the order `wanted`.

    Both list the layer at each place. Stacked is what lies under a key `layers` with as many rows: parameters, and what
    an optimizer keeps of them. Each array keeps its sharding and is moved by itself, so that no more than one is ever
    whole along `layers` on a device. With `donate` the arrays of `tree` are given up.
    """
    if tuple(held) == tuple(wanted):
        return tree
    place = {layer: i for i, layer in enumerate(held)}
    places = tuple(place[layer] for layer in wanted)

    def moved(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        if leaf.shape[:1] != (len(places),) or all(getattr(key, "key", None) != "layers" for key in path):
            return leaf
        return _mover(places, leaf.sharding, donate)(leaf)

    return jax.tree_util.tree_map_with_path(moved, tree)


@functools.lru_cache
def _mover(places: tuple[int, ...], sharding: Sharding, donate: bool) -> Callable[[jax.Array], jax.Array]:
    axes = sharding.spec[0] if isinstance(sharding, NamedSharding) and len(sharding.spec) else None

    def move(part: jax.Array) -> jax.Array:
        if axes is None:
            return part[jnp.asarray(places)]
        # Explicitly: the partitioner would permute in ways that are no ring.
        whole = jax.lax.all_gather(part, axes, axis=0, tiled=True)
        start = jax.lax.axis_index(axes) * len(part)
        return whole[jax.lax.dynamic_slice_in_dim(jnp.asarray(places), start, len(part))]

    function = move
    if isinstance(sharding, NamedSharding):
        spec = sharding.spec
        function = jax.shard_map(move, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(function, out_shardings=sharding, donate_argnums=(0,) if donate else ())
