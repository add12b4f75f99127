"""Layers in stages, one on each device along `pipeline`, and microbatches that pass through them in a circle.

The schedule is the interleaved one (Narayanan et al. 2021, arXiv:2104.04473, section 2.2) in the circular form of
Praxis and MaxText, without separate steps for the backward pass: that is the transpose of this loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from trainfw.parallel.collectives import axis_index, axis_size, ring_shift

Tree = TypeVar("Tree")

AXIS = "pipeline"


def pipelined(
    stage: Callable[[jax.Array, Any, Any], tuple[Any, Any]],
    x: Any,
    side: Any = None,
    *,
    chunks: int = 1,
    remat: bool = False,
    policy: Callable[..., bool] | None = None,
) -> tuple[Any, Any]:
    """Pass `x` through every chunk of layers; return it with the chunks' other outputs. Runs in shard_map.

    Of the P * chunks chunks of consecutive layers, stage p of P holds p, p + P, p + 2P ... (see `stage_order`). The
    stages' microbatches of one place in `x` go round together, `chunks` times: M microbatches in all take
    M * chunks + P - 1 iterations, and a stage idles for P - 1 of them (`bubble`). An idle stage computes too, on real
    activations of no consequence: a loss whose gradients are finite has no NaN from there.

    An iteration moves each stage's result to the next stage, and turns by one place a second ring that takes inputs
    to stage 0 and outputs back to where the inputs came from: two permutes, each of one microbatch (b * S * D elements
    and its side data). Both are full circles, forward and, transposed, backward. No other collective is used, and
    none along an axis of one device, where this is a loop over microbatches.

    Args:
        stage: (chunk, x, side) -> (x, out) runs one microbatch through this device's chunk number `chunk`, i32[];
            `out` is a pytree of arrays.
        x: the k microbatches of this device, a pytree of arrays (k, ...); M = k * P.
        side: what goes along with them unchanged (segment ids, positions), a pytree of arrays (k, ...).
        chunks: how many each stage holds.
        remat: keep only the stages' inputs for the backward pass and what `policy` (of `jax.checkpoint`) says, and
            compute the rest anew. Else a chunk's weights, too, are kept for every iteration.

    Returns:
        x, in the place of the inputs (k, ...); and `out` of this device's own chunks (chunks, ...), summed over all M
        microbatches. One `out` is kept for every iteration until then.
    """
    stages, place = axis_size(AXIS), axis_index(AXIS)
    count = jax.tree.leaves(x)[0].shape[0]
    busy = count * stages * chunks  # iterations of each stage that count
    iterations = busy + stages - 1
    run = jax.checkpoint(stage, prevent_cse=False, policy=policy) if remat else stage

    def feed(t: jax.Array | int, buffer: Tree, slot: Tree, received: Tree) -> tuple[Tree, Tree, Tree]:
        """Return a stage's input at iteration `t`: at stage 0, and in a group's first round, its place on the ring.

        What stage 0 received instead is then done, and takes that place: the ring brings it home.
        """
        group, step = jnp.divmod(jnp.int32(t), stages * chunks)

        def swap(buffer: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            exchange = _swap if jnp.issubdtype(buffer.dtype, jnp.inexact) else _exchange  # integers have no gradient
            return exchange(step == 0, group, buffer, value)

        trees = jax.tree.structure(buffer), jax.tree.structure((0, 0))
        buffer, slot = jax.tree.transpose(*trees, jax.tree.map(swap, buffer, slot))
        enters = (step < stages) & (place == 0)
        return buffer, _shift(_where(enters, received, slot)), _where(enters, slot, received)

    def iterate(carry: Any, t: jax.Array) -> tuple[Any, Any]:
        buffer, slot, (x, side) = feed(t, *carry)
        chunk = jnp.clip(t - place, 0, busy - 1) // stages % chunks
        x, out = run(chunk, x, side)
        return (buffer, slot, _shift((x, side))), out

    inputs = (x, side)
    first = jax.tree.map(lambda a: a[0], inputs)  # not zeros: see above of idle stages
    buffer = jax.tree.map(lambda a: jnp.concatenate([a, a[-1:]]), inputs)
    carry, outs = jax.lax.scan(iterate, (buffer, first, first), jnp.arange(iterations, dtype=jnp.int32))
    (buffer, _), (last, _), _ = feed(iterations, *carry)
    # The outputs of a group are put away when the second group after it is taken out.
    x = jax.tree.map(lambda a, b: jnp.concatenate([a[2:], b[None]]), buffer, last)

    def total(out: jax.Array) -> jax.Array:
        counted = jax.lax.dynamic_slice_in_dim(out, place, busy)
        return counted.reshape(count, chunks, stages, *out.shape[1:]).sum((0, 2))

    return x, jax.tree.map(total, outs)


def chunk_of(stacked: Tree, chunk: jax.Array, chunks: int) -> Tree:
    """Take chunk number `chunk` of a pytree of arrays stacked over this device's layers."""
    if chunks == 1:
        return stacked
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a.reshape(chunks, -1, *a.shape[1:]), chunk, keepdims=False), stacked
    )


def stage_order(num_layers: int, stages: int, chunks: int) -> tuple[int, ...]:
    """List the layer at each place of the stacked parameters: stage 0, chunk by chunk, then stage 1 ..."""
    if stages == 1 or chunks == 1:
        return tuple(range(num_layers))
    size = num_layers // (stages * chunks)
    return tuple(
        (chunk * stages + stage) * size + layer
        for stage in range(stages)
        for chunk in range(chunks)
        for layer in range(size)
    )


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


def _shift(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: ring_shift(a, AXIS), tree)


def _where(condition: jax.Array, yes: Tree, no: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _exchange(on: jax.Array, index: jax.Array, buffer: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Swap entry `index` of the buffer and the value, where `on`."""
    held = jax.lax.dynamic_index_in_dim(buffer, index, keepdims=False)
    buffer = jax.lax.dynamic_update_index_in_dim(buffer, jnp.where(on, value, held), index, 0)
    return buffer, jnp.where(on, held, value)


@jax.custom_vjp
def _swap(on: jax.Array, index: jax.Array, buffer: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    # An exchange is its own transpose. JAX's would add a whole buffer of zeros but for one entry, every iteration.
    return _exchange(on, index, buffer, value)


_swap.defvjp(
    lambda on, index, buffer, value: (_exchange(on, index, buffer, value), (on, index)),
    lambda where, grads: (None, None, *_swap(*where, *grads)),
)
