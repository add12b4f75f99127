"""Matrix products in the forms for which XLA's CPU backend has fast kernels.

Those take operands as they lie in memory, contracted along the last dim of the first: what is to be transposed is so
beforehand. And bfloat16 operands with a float32 result, which the AMX units of a CPU compute some five times as fast
as a bfloat16 result, for which XLA takes another way (jaxlib 0.10.2; `benchmarks/machine.py` has the rates).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from trainfw.backends.base import MatmulRequest


def refuses(request: MatmulRequest) -> str | None:
    """Say why these are not for a request: they have been measured for some dtypes only."""
    return None if request.dtype in ("bfloat16", "float32") else "it is for bfloat16 and float32"


def load(request: MatmulRequest) -> Callable[..., jax.Array]:
    return over_rows if request.over_rows else matmul


def row_major(x: jax.Array) -> jax.Array:
    """Lay out `x` with its last dim contiguous in memory. XLA would else leave a transposition to what reads it."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute `jnp.einsum` of two arrays of one dtype, in float32."""
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x_ND: jax.Array, w_DF: jax.Array) -> jax.Array:
    """Compute `x_ND @ w_DF`, in their dtype."""
    return product("nd,df->nf", x_ND, w_DF).astype(x_ND.dtype)


def _forward(x_ND: jax.Array, w_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x_ND, w_DF), (x_ND, w_DF)


def _backward(kept: tuple[jax.Array, jax.Array], dy_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_ND, w_DF = kept
    dx_ND = product("nf,df->nd", dy_NF, w_DF).astype(x_ND.dtype)
    return dx_ND, over_rows(x_ND, dy_NF).astype(w_DF.dtype)


matmul.defvjp(_forward, _backward)


def over_rows(x_ND: jax.Array, y_NF: jax.Array) -> jax.Array:
    """Sum the products of two arrays over their rows, f32[D, F]."""
    (N, D), F = x_ND.shape, y_NF.shape[1]
    if F * (N + 2 * D) < N * D:  # less to turn round: y and the result, rather than x
        # Its own turn kept apart: XLA would make it part of the product, in a form that it has no kernel for.
        return row_major(over_rows(y_NF, x_ND)).T
    return product("dn,nf->df", row_major(x_ND.T), y_NF)
