"""Matrix products, in forms that backends multiply and differentiate well; and weights that do not learn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw import backends
from trainfw.quantization import Quantized, dequantize, fp8_matmul


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """`x` squashed into (-cap, cap) with tanh (Gemma 2, arXiv:2408.00118); as it is without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def matmul(x: jax.Array, kernel: jax.Array, *, fp8: bool = False) -> jax.Array:
    """`x @ kernel` of a matrix, the leading dims of x taken as one; `fp8`: of operands in 8 bits.

    The kernel's gradient is then one product of matrices. With two dims of tokens to sum over, XLA's CPU backend
    transposes what it is made of element by element: a feed-forward takes 1.7 times as long.
    """
    request = backends.MatmulRequest(x.dtype.name)
    product = fp8_matmul if fp8 else backends.resolve("matmul", request, backends.current()).call or jnp.matmul
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def over_rows(x_ND: jax.Array, y_NF: jax.Array) -> jax.Array:
    """Products of two arrays of one dtype, summed over their rows in float32: f32[D, F]."""
    request = backends.MatmulRequest(x_ND.dtype.name, over_rows=True)
    product = backends.resolve("matmul", request, backends.current()).call
    if product is not None:
        return product(x_ND, y_NF)
    return jnp.einsum("nd,nv->dv", x_ND, y_NF, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, y)` in float32, the operands of one dtype; its gradients are products in that dtype too.

    JAX's own gradient would multiply the float32 cotangent by the other operand at the rate of float32, which a tensor
    engine takes several times longer for. Rounding the cotangent to the operands' dtype first is what implementations
    of attention do (Dao, FlashAttention-2, arXiv:2307.08691), and what a product with a narrow result would.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _backward(spec: str, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, back = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
    return back(cotangent.astype(operands[0].dtype))


wide_einsum.defvjp(lambda spec, *operands: (wide_einsum(spec, *operands), operands), _backward)


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


def _frozen_backward(product: Callable[..., jax.Array], kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    like, weight, others = kept
    wide = dense(weight, like.dtype)
    # Its gradient rather than its transpose: a product may be a kernel that has only the former. Being linear, it has
    # the same one at zero, where nothing is computed for it.
    _, transpose = jax.vjp(lambda x: product(x, wide, *others), jnp.zeros(like.shape, like.dtype))
    return (*transpose(cotangent), None, *(None for _ in others))


frozen_product.defvjp(
    lambda product, x, weight, *others: (
        frozen_product(product, x, weight, *others),
        (_Shape(x.shape, x.dtype), weight, others),
    ),
    _frozen_backward,
)


def freeze(module: nnx.Module) -> None:
    """Turn every `nnx.Param` of a module into a `Frozen`, in place."""
    for _, owner in nnx.iter_modules(module):
        for name, value in list(vars(owner).items()):
            if isinstance(value, nnx.Param):
                setattr(owner, name, Frozen(value.get_value(), **value.get_metadata()))
