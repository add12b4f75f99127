"""Kernels of GPUs in place of XLA's forms; jax is imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainfw.backends.base import AttentionRequest

if TYPE_CHECKING:
    import jax

MAX_HEAD_DIM = 128
"""Largest head dim of cuDNN's attention on every GPU that has it; 256 from Hopper on, which a request does not tell."""


def attention_refuses(request: AttentionRequest) -> str | None:
    """Say why cuDNN's attention cannot do what is asked, as `jax.nn.dot_product_attention` documents and checks it."""
    if request.dtype not in ("bfloat16", "float16"):
        return f"it multiplies bfloat16 or float16, not {request.dtype}"
    if request.cached or not request.causal or request.query_length != request.key_length:
        return "it is taken for causal self-attention only"
    if request.softcap is not None:
        return "it does not cap scores"
    if request.head_dim % 8 or request.head_dim > MAX_HEAD_DIM:
        return f"a head has {request.head_dim} numbers, not a multiple of 8 up to {MAX_HEAD_DIM}"
    if request.query_length % 2:
        return f"a row has {request.query_length} tokens, an odd number"
    return None


def load_attention(request: AttentionRequest) -> Callable[..., jax.Array]:
    """Load cuDNN's attention. Raises ImportError where jax's GPU platform is not CUDA's."""
    from trainfw.backends.gpu.cudnn import load

    return load(request)
