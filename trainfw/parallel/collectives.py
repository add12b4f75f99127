"""Collectives over mesh axes, for code that each device runs on its own parts of arrays (inside `jax.shard_map`).

Outside a mesh, and along an axis of one device, each is the identity: a model is written once. Differentiated inside
shard_map they follow one convention: the objective is the sum of all devices' objectives. What several devices
compute alike must therefore enter it divided by their number, and the gradient of a replicated parameter is the sum
over the devices that hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from trainfw.parallel.rules import active_rules

Axes: TypeAlias = str | Sequence[str]


def axis_size(axes: Axes) -> int:
    """Count the devices along one mesh axis, or along several; 1 outside a mesh."""
    return math.prod(_sizes(axes).values())


def axis_index(axis: str) -> jax.Array:
    """Return this device's place along `axis`, i32[]."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else jnp.int32(0)


def all_gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Join the parts of `x` that the devices along `axes` hold along `dim`. Its gradient is a reduce_scatter."""
    names = tuple(_sizes(axes))
    return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def reduce_scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Sum `x` over the devices along `axes`, each of which keeps its part along `dim`.

    Its gradient is an all_gather.
    """
    names = tuple(_sizes(axes))
    return jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True) if names else x


def all_reduce(x: jax.Array, axes: Axes) -> jax.Array:
    """Sum `x` over the devices along `axes`. Its gradient is an all_reduce."""
    names = tuple(_sizes(axes))
    return jax.lax.psum(x, names) if names else x


def gather_sequence(x_BSD: jax.Array) -> jax.Array:
    """Return the whole sequence, of which each device along `tensor` has a part between layers."""
    return all_gather(x_BSD, "tensor", 1) if _splits_sequence() else x_BSD


def scatter_sequence(y_BSD: jax.Array) -> jax.Array:
    """Return the sum over `tensor`, of which each device keeps its part of the sequence between layers."""
    return reduce_scatter(y_BSD, "tensor", 1) if _splits_sequence() else all_reduce(y_BSD, "tensor")


def _splits_sequence() -> bool:
    rules = active_rules()
    return rules is None or rules.splits_sequence


def all_max(x: jax.Array, axes: Axes) -> jax.Array:
    """Take the largest `x` of the devices along `axes`. It has no gradient."""
    names = tuple(_sizes(axes))
    return jax.lax.pmax(jax.lax.stop_gradient(x), names) if names else jax.lax.stop_gradient(x)


def all_to_all(x: jax.Array, axis: str, split: int, concat: int) -> jax.Array:
    """Send part i of `x` along dim `split` to device i along `axis`, and join what comes along dim `concat`."""
    if axis_size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=concat, tiled=True)


def ring_shift(x: jax.Array, axis: str) -> jax.Array:
    """Take the `x` of the previous device along `axis`, the last before the first: a full circle, as Neuron demands."""
    size = axis_size(axis)
    return x if size == 1 else jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _sizes(axes: Axes) -> dict[str, int]:
    rules = active_rules()
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    sizes = {} if rules is None else rules.mesh.shape
    return {name: sizes[name] for name in names if sizes.get(name, 1) > 1}
