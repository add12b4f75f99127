"""Products of a few rows with a weight, which is what a token costs: each weight is read once, from memory.

`benchmarks/generate.py` times them; rates below are of two cores that read 25 to 30 GB/s (jaxlib 0.10.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from trainfw.backends.base import DecodingRequest

_PARTS = 4
_MOST_ROWS = 16
"""Rows up to which these are faster than products of matrices as they are written."""


def refuses(request: DecodingRequest) -> str | None:
    """Say why these would gain nothing."""
    if request.dtype != "float32":
        return "it is for float32"
    return f"it is for {_MOST_ROWS} rows at most" if request.rows > _MOST_ROWS else None


def compiler_options(rows: int) -> dict[str, str]:
    """Choose XLA's options for a step of so many rows."""
    if rows > 1:
        return {}
    return {
        # Reductions by threads cost more to hand out than these take: 26.3 ms a token with them, 23.0 without. With 8
        # rows attention's are worth it: 48 and 57 ms.
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_cpu_prefer_vector_width": "512",  # 22.2 ms
    }


def turns(rows: int) -> bool:
    """Tell whether `few_rows` takes weights turned round, (out, in), for so many rows of a step."""
    return rows > 1


def few_rows(x: jax.Array, w_KN: jax.Array) -> jax.Array:
    """Multiply x (..., in) of a step of one row by a weight (in, out)."""
    x_RK = x.reshape(-1, x.shape[-1])
    y_RN = product(x_RK, w_KN) if x_RK.shape[0] == 1 else x_RK @ w_KN
    return y_RN.reshape(*x.shape[:-1], -1)


def few_rows_turned(x: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Multiply x (..., in) of a step of several rows by a weight (out, in)."""
    return columns(x.reshape(-1, x.shape[-1]), w_NK).reshape(*x.shape[:-1], -1)


def joined(kernels: Sequence[jax.Array], rows: int) -> jax.Array:
    """Join kernels (in, out) of the same inputs, as `product` takes them for so many rows: one product, not several."""
    w_KN = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)
    return w_KN if rows == 1 else w_KN.T


def product(x_RK: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x_RK by a weight of `joined`."""
    if x_RK.shape[0] == 1:
        K, N = w.shape
        if K % _PARTS:
            return x_RK @ w
        # A product of one vector is shared among the cores by its batch dim: 24 GB/s, where it has none 19.
        partial = jnp.einsum("ck,ckn->cn", x_RK.reshape(_PARTS, -1), w.reshape(_PARTS, -1, N))
        return jnp.sum(partial, axis=0)[None]
    return columns(x_RK, w)


def columns(x_RK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Compute x_RK @ w_NK.T with the weight on the left, where XLA's kernels do not copy it: 1.3 to 2 times as fast.

    The barriers keep XLA from turning it round.
    """
    N, K = w_NK.shape
    x_KR = x_RK.T
    R = x_KR.shape[1]
    # Its kernels compute 16 columns in the time of 8, and take some time for each row of the result. So two rows of the
    # weight as one, which meets x in two places: half the rows, and twice the columns.
    fold = 2 if R <= 8 and K < 1024 and N >= 2048 and N % 2 == 0 else 1
    if fold == 2:
        zeros = jnp.zeros_like(x_KR)
        x_KR = jnp.block([[x_KR, zeros], [zeros, x_KR]])
    y_NR = w_NK.reshape(N // fold, K * fold) @ jax.lax.optimization_barrier(x_KR)
    return jax.lax.optimization_barrier(y_NR).reshape(N, R).T
