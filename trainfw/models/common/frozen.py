"""Weights that do not learn: kept in any precision, and products with them that keep nothing for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.quantization import Quantized, dequantize


class Frozen(nnx.Variable):
    """A weight with neither gradient nor optimizer state: an array of any float dtype, or `Quantized`."""


def dense(weight: jax.Array | Quantized, dtype: Any) -> jax.Array:
    """The weight in `dtype`."""
    return dequantize(weight, dtype) if isinstance(weight, Quantized) else weight.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_product(
    product: Callable[..., jax.Array], x: jax.Array, weight: jax.Array | Quantized, *others: Any
) -> jax.Array:
    """`product(x, weight in the dtype of x, *others)`, linear in x; only x has a gradient.

    What the backward pass keeps is the weight as it is stored: it is widened again there, one weight at a time.
    """
    return product(x, dense(weight, x.dtype), *others)


def _forward(product: Callable[..., jax.Array], x: jax.Array, weight: Any, *others: Any) -> tuple[jax.Array, Any]:
    return frozen_product(product, x, weight, *others), (_Shape(x.shape, x.dtype), weight, others)


def _backward(product: Callable[..., jax.Array], kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    like, weight, others = kept
    wide = dense(weight, like.dtype)
    # Its gradient rather than its transpose: a product may be a kernel that has only the former. Being linear, it has
    # the same one at zero, where nothing is computed for it.
    _, transpose = jax.vjp(lambda x: product(x, wide, *others), jnp.zeros(like.shape, like.dtype))
    return (*transpose(cotangent), None, *(None for _ in others))


frozen_product.defvjp(_forward, _backward)


def freeze(module: nnx.Module) -> None:
    """Turn every `nnx.Param` of a module into a `Frozen`, in place."""
    for _, owner in nnx.iter_modules(module):
        for name, value in list(vars(owner).items()):
            if isinstance(value, nnx.Param):
                setattr(owner, name, Frozen(value.get_value(), **value.get_metadata()))
