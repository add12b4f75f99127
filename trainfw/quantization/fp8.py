"""Products of matrices in 8 bits, for training: E4M3 forward, E5M2 for gradients (Micikevicius et al.,
arXiv:2209.05433).

Each operand is scaled so that its largest number is the largest of its format, by what it holds now ("current
scaling"). Sums are in float32, and nothing but the operands is narrow: weights, activations and gradients are kept as
ever. On a device that holds a part of an array, the scale is that part's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from trainfw import backends

if TYPE_CHECKING:
    from jax.typing import DTypeLike


def _narrow(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Return (x / scale in the dtype, the scale, f32[])."""
    top = jnp.max(jnp.abs(x)).astype(jnp.float32)
    # Not below what has an inverse: zeros stay zeros, and the smallest numbers do not become infinite.
    scale = jnp.maximum(top / float(jnp.finfo(dtype).max), jnp.finfo(jnp.float32).tiny)
    return (x.astype(jnp.float32) * (1.0 / scale)).astype(dtype), scale


def _product(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiply `scale` and two narrow matrices contracted along a dim of each; compilers take it for one kernel."""
    wide = jax.lax.dot_general(x, y, (((x_dim,), (y_dim,)), ((), ())), preferred_element_type=dtype)
    return (wide * scale).astype(dtype)


@jax.custom_vjp
def fp8_matmul(x_ND: jax.Array, w_DF: jax.Array) -> jax.Array:
    """Compute `x_ND @ w_DF` with operands rounded to 8 bits, in the dtype of x."""
    return _forward(x_ND, w_DF)[0]


def _forward(x_ND: jax.Array, w_DF: jax.Array) -> tuple[jax.Array, tuple[object, ...]]:
    dtype = backends.current().fp8_dtypes[0]
    (x, of_x), (w, of_w) = _narrow(x_ND, dtype), _narrow(w_DF, dtype)
    y_NF = _product(x, w, 1, 0, of_x * of_w, x_ND.dtype)
    # Their narrow forms are what is kept: a half of what bfloat16 ones take. As integers, since jax.checkpoint rounds
    # what it saves to the bits of its dtype (reduce_precision), and to XLA what e4m3fn has beyond 240 is infinite.
    x_bits, w_bits = (jax.lax.bitcast_convert_type(a, jnp.uint8) for a in (x, w))
    return y_NF, (x_bits, of_x, w_bits, of_w, jnp.zeros(0, w_DF.dtype))


def _backward(kept: tuple[jax.Array, ...], dy_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_bits, of_x, w_bits, of_w, like_w = kept
    forward, backward = backends.current().fp8_dtypes
    x, w = (jax.lax.bitcast_convert_type(bits, jnp.dtype(forward)) for bits in (x_bits, w_bits))
    dy, of_dy = _narrow(dy_NF, backward)
    dx_ND = _product(dy, w, 1, 1, of_dy * of_w, dy_NF.dtype)
    dw_DF = _product(x, dy, 0, 0, of_x * of_dy, like_w.dtype)
    return dx_ND, dw_DF


fp8_matmul.defvjp(_forward, _backward)
