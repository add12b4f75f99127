"""cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array
from jax.extend.backend import get_backend

from trainfw.backends.base import AttentionRequest

MAX_HEAD_DIM = 128
"""Largest head dim of cuDNN's attention on every GPU that has it; 256 from Hopper on, which a request does not tell."""


def refuses(request: AttentionRequest) -> str | None:
    """Say why cuDNN's attention cannot do what is asked, as `jax.nn.dot_product_attention` documents and checks it."""
    beside, heads = request.segments or request.window is not None, f"a head has {request.head_dim} numbers"
    reasons = {
        f"it multiplies bfloat16 or float16, not {request.dtype}": request.dtype not in ("bfloat16", "float16"),
        "it is taken for self-attention only": request.query_length != request.key_length,
        "without causality it is taken for attention to all keys only": not request.causal and beside,
        "it does not cap scores": request.softcap is not None,
        f"{heads}, not a multiple of 8 up to {MAX_HEAD_DIM}": request.head_dim % 8 or request.head_dim > MAX_HEAD_DIM,
        f"a row has {request.query_length} tokens, an odd number": request.query_length % 2,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def load(request: AttentionRequest) -> Callable[..., Array]:
    """Load the kernel for a request, called like `trainfw.models`' `attend`. Raises ImportError where none is."""
    if "cuda" not in get_backend().platform_version.lower():
        raise ImportError("cuDNN is CUDA's, and these GPUs are not")
    # The window holds the query itself; jax counts the keys to its left.
    window = None if request.window is None else (request.window - 1, 0)

    def attend(
        q_BSHh: Array,
        k_BTKh: Array,
        v_BTKh: Array,
        mask_BST: Array | None,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Array:
        assert softcap is None  # refused
        # Documents are causal too: whole blocks of keys are left out. The mask, where there is more to it, is read as a
        # bias of the scores, one for all heads: less than the scores would be, and cuDNN takes no segments.
        return jax.nn.dot_product_attention(
            q_BSHh,
            k_BTKh,
            v_BTKh,
            mask=mask_BST[:, None] if request.segments and mask_BST is not None else None,
            scale=scale,
            is_causal=request.causal,
            local_window_size=window,
            implementation="cudnn",
        )

    return attend
