"""Kernels of the CPU in place of XLA's forms; jax is imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainfw.backends.base import AttentionRequest, DecodingRequest, MatmulRequest

if TYPE_CHECKING:
    import jax


def attention_refuses(request: AttentionRequest) -> str | None:
    """Say why `blocks` cannot do what is asked."""
    if request.cached or not request.causal or request.query_length != request.key_length:
        return "it is for causal self-attention only"
    return None


def load_attention(request: AttentionRequest) -> Callable[..., jax.Array]:
    from trainfw.backends.cpu.blocks import blocked_attend

    return blocked_attend


def matmul_refuses(request: MatmulRequest) -> str | None:
    """Say why `products` is not for a request: it has been measured for some dtypes only."""
    return None if request.dtype in ("bfloat16", "float32") else "it is for bfloat16 and float32"


def load_matmul(request: MatmulRequest) -> Callable[..., jax.Array]:
    from trainfw.backends.cpu import products

    return products.over_rows if request.over_rows else products.matmul


MOST_ROWS = 16
"""Rows up to which the products of `decoding` are faster than those of matrices as they are written."""


def decoding_refuses(request: DecodingRequest) -> str | None:
    """Say why `decoding` would gain nothing."""
    if request.dtype != "float32":
        return "it is for float32"
    return f"it is for {MOST_ROWS} rows at most" if request.rows > MOST_ROWS else None


def load_decoding(request: DecodingRequest) -> Any:
    from trainfw.backends.cpu import decoding

    return decoding
