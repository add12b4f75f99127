"""What the CPU has in the place of XLA's forms; imports jax when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainfw.backends.base import AttentionRequest, MatmulRequest


def attention_refuses(request: AttentionRequest) -> str | None:
    """What `blocks` cannot do."""
    if request.cached or not request.causal or request.query_length != request.key_length:
        return "it is for causal self-attention only"
    return None


def load_attention(request: AttentionRequest) -> Callable[..., Any]:
    from trainfw.backends.cpu.blocks import blocked_attend  # imports jax

    return blocked_attend


def matmul_refuses(request: MatmulRequest) -> str | None:
    """What `products` would gain nothing for."""
    return None if request.dtype == "bfloat16" else "XLA's products of it are as fast in any form"


def load_matmul(request: MatmulRequest) -> Callable[..., Any]:
    from trainfw.backends.cpu import products

    return products.over_rows if request.over_rows else products.matmul
