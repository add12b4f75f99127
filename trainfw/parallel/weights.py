"""Weights where they are used, and their gradients where they are kept.

Inside `jax.shard_map` each device holds its part of every weight. `gather_weight` puts together what the rules split
only for keeping; its transpose scatters the gradient's sum. What is left, the sum over devices that hold the same part,
is done once a step (`reduce_gradient`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from trainfw.parallel.collectives import all_gather, all_reduce, axis_index, axis_size, reduce_scatter
from trainfw.parallel.rules import SPLIT_RULES, Rules, active_rules
from trainfw.quantization import Quantized

GATHERED = "gathered weight"
"""Name of gathered weights, for policies of `jax.checkpoint`: they are gathered again rather than kept."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Replica:
    """A weight that every device holds whole, while its gradient is scattered (ZeRO-2)."""

    part: jax.Array
    """Part of this device, to which the gradient belongs."""
    whole: jax.Array


def gather_weight(
    weight: Any, names: Sequence[str | None], dtype: Any = None, *, num_kv_heads: int | None = None
) -> Any:
    """Gather a weight for use in `dtype`: cast, and then gathered, so that what crosses the links is as narrow.

    A `Quantized` weight is gathered as it is, array by array, and stays quantised.

    Args:
        weight: an array, a `Replica` or a `Quantized`.
        names: of its dims.
        num_kv_heads: where `tensor` spans more devices than there are heads of keys and values, several have the same
            one: dim `kv_heads` is gathered, and each takes its head. (Gathering among those that share a head would
            move less, little as it is, but in groups that Neuron does not take.)
    """
    if isinstance(weight, Quantized):
        return jax.tree.map(
            lambda part, names: gather_weight(part, names, num_kv_heads=num_kv_heads),
            weight,
            weight.dims(names, SPLIT_RULES),
        )
    rules = active_rules()
    if rules is None or rules.mesh.size == 1:
        assert not isinstance(weight, Replica)
        return weight.astype(dtype or weight.dtype)
    if isinstance(weight, Replica):
        dtype = dtype or weight.part.dtype
        x = _use(weight.part.astype(dtype), jax.lax.stop_gradient(weight.whole).astype(dtype), tuple(names))
    else:
        x = weight.astype(dtype or weight.dtype)
        for dim, name in enumerate(names if rules.fsdp_shards == "parameters" else ()):
            x = all_gather(x, rules.gathered(name), dim)
    if num_kv_heads is not None and "kv_heads" in names and axis_size("tensor") > num_kv_heads:
        dim = names.index("kv_heads")
        x = all_gather(x, "tensor", dim)
        head_dim = x.shape[dim] // num_kv_heads
        mine = axis_index("tensor") // (axis_size("tensor") // num_kv_heads)
        x = jax.lax.dynamic_slice_in_dim(x, mine * head_dim, head_dim, dim)
    return checkpoint_name(x, GATHERED)


def reduce_gradient(grad: jax.Array, names: Sequence[str | None], rules: Rules) -> jax.Array:
    """Sum a gradient as the optimizer takes it, from the parts that `gather_weight` leaves on every device."""
    if rules.fsdp_shards == "optimizer":
        grad = _scattered(grad, names, rules)
    held = {axis for name in names for axis in rules.axes(name)}
    return all_reduce(grad, [axis for axis in rules.mesh.axis_names if axis not in held])


def _scattered(grad: jax.Array, names: Sequence[str | None], rules: Rules) -> jax.Array:
    for dim, name in enumerate(names):
        grad = reduce_scatter(grad, rules.gathered(name), dim)
    return grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _use(part: jax.Array, whole: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Return `whole`, whose gradient is scattered to `part`."""
    return whole


def _use_backward(names: tuple[str | None, ...], _: None, grad: jax.Array) -> tuple[jax.Array, None]:
    rules = active_rules()
    assert rules is not None
    return _scattered(grad, names, rules), None


_use.defvjp(lambda part, whole, names: (whole, None), _use_backward)
