"""Products of a few rows with a weight, which is what a token costs: each weight is read once, from memory.

`benchmarks/serving.py` times tokens; rates below are of two cores that read 25 to 30 GB/s (jaxlib 0.10.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trainfw.backends.base import DecodingProduct, DecodingRequest
from trainfw.backends.cpu.products import row_major

_PARTS = 4
_MOST_ROWS = 16
"""Rows up to which float32's are faster than products of matrices as they are written."""


def refuses(request: DecodingRequest) -> str | None:
    """Say why these would gain nothing."""
    if request.kept not in ("float32", "bfloat16", "int8"):
        return "it is for weights in float32, bfloat16 and int8"
    if request.kept != "float32":
        return None
    if request.dtype != "float32":
        return "weights in float32 are for products in float32"
    return f"in float32 it is for {_MOST_ROWS} rows at most" if request.rows > _MOST_ROWS else None


def load(request: DecodingRequest) -> DecodingProduct:
    """Return the product of a step of so many rows."""
    if request.rows > 1 or request.kept != "float32":
        return DecodingProduct(turned, True, _OF_VECTORS if request.rows == 1 else {})
    return DecodingProduct(as_written, False, _OF_VECTORS)


_OF_VECTORS = {
    # Reductions by threads cost more to hand out than these take: 26.3 ms a token with them, 23.0 without. With 8 rows
    # attention's are worth it: 48 and 57 ms.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_prefer_vector_width": "512",  # 22.2 ms
}


def as_written(x: jax.Array, w_KN: jax.Array) -> jax.Array:
    """Multiply x (..., in) of a step of one row by a weight (in, out), both f32."""
    x_RK = x.reshape(-1, x.shape[-1])
    y_RN = _of_vector(x_RK, w_KN) if x_RK.shape[0] == 1 else x_RK @ w_KN
    return y_RN.reshape(*x.shape[:-1], -1)


def _of_vector(x_1K: jax.Array, w_KN: jax.Array) -> jax.Array:
    K, N = w_KN.shape
    if K % _PARTS:
        return x_1K @ w_KN
    # A product of one vector is shared among the cores by its batch dim: 24 GB/s, where it has none 19.
    partial = jnp.einsum("ck,ckn->cn", x_1K.reshape(_PARTS, -1), w_KN.reshape(_PARTS, -1, N))
    return jnp.sum(partial, axis=0)[None]


def turned(x: jax.Array, w_NK: jax.Array, scales_N: jax.Array | None = None) -> jax.Array:
    """Multiply x (..., in), f32 or bf16, by a weight (out, in) as it is kept: f32.

    Args:
        w_NK: f32, bf16, or int8 with `scales_N`.
    """
    x_RK = x.reshape(-1, x.shape[-1])
    if scales_N is not None:
        y_RN = _of_bytes(x_RK, w_NK) * scales_N
    else:
        y_RN = (_of_halves if w_NK.dtype == jnp.bfloat16 else _columns)(x_RK, w_NK)
    return y_RN.reshape(*x.shape[:-1], -1)


def _columns(x_RK: jax.Array, w_NK: jax.Array) -> jax.Array:
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


def _of_halves(x_RK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Multiply by a weight in bf16, x in f32 as the sum of three terms in bf16, which together are exact.

    More columns cost little, as the weight is read once. One vector alone meets no fast kernel: hence one of zeros.
    """
    if x_RK.dtype == jnp.bfloat16:
        terms = [x_RK, jnp.zeros_like(x_RK)] if x_RK.shape[0] == 1 else [x_RK]
    else:
        terms, left = [], x_RK
        for _ in range(3):
            terms.append(left.astype(jnp.bfloat16))
            left = left - terms[-1].astype(jnp.float32)
    return _sum(_columns_of_terms(w_NK, terms))


def _of_bytes(x_RK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Multiply by integers in int8, each row of x as its largest number times three digits: to 1 in 2**23 of that.

    Products of bytes are exact, in i32 (for fewer than 2**17 inputs), and the weight is never widened.
    """
    wide = x_RK.astype(jnp.float32)
    unit_R1 = jnp.max(jnp.abs(wide), axis=1, keepdims=True) / 127.0
    left, terms = wide / jnp.where(unit_R1 == 0.0, 1.0, unit_R1), []
    for _ in range(3):
        digit = jnp.round(left)
        terms.append(digit.astype(jnp.int8))
        left = (left - digit) * _BASE
    parts = _columns_of_terms(w_NK, terms)
    return _sum([part.astype(jnp.float32) * _BASE**-i for i, part in enumerate(parts)]) * unit_R1


_BASE = 254.0
"""A digit, -127 to 127, is rounded from what is within half of one of it."""


def _columns_of_terms(w_NK: jax.Array, terms: list[jax.Array]) -> list[jax.Array]:
    """Return term @ w_NK.T of each term (R, K), in one product: f32, or i32 of integers."""
    wide = jnp.int32 if w_NK.dtype == jnp.int8 else jnp.float32
    x_KC = row_major(jnp.concatenate(terms).T)
    y_NC = row_major(jax.lax.dot(w_NK, x_KC, preferred_element_type=wide))
    return [part.T for part in jnp.split(y_NC, len(terms), axis=1)]


def _sum(parts: list[jax.Array]) -> jax.Array:
    """Sum, the smallest first."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = part + total
    return total
