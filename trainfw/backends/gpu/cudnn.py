"""cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend.backend import get_backend

from trainfw.backends.base import AttentionRequest


def load(request: AttentionRequest) -> Callable[..., jax.Array]:
    """Load the kernel for a request, called like `trainfw.models`' `attend`."""
    if "cuda" not in get_backend().platform_version.lower():
        raise ImportError("cuDNN is CUDA's, and these GPUs are not")
    # The window holds the query itself; jax counts the keys to its left.
    window = None if request.window is None else (request.window - 1, 0)

    def attend(
        q_BSHh: jax.Array,
        k_BTKh: jax.Array,
        v_BTKh: jax.Array,
        mask_BST: jax.Array,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> jax.Array:
        assert softcap is None  # refused
        # Causal in either case: whole blocks of keys are left out. The mask, where there is more to it, is read as a
        # bias of the scores, one for all heads: less than the scores would be, and cuDNN takes no segments.
        return jax.nn.dot_product_attention(
            q_BSHh,
            k_BTKh,
            v_BTKh,
            mask=mask_BST[:, None] if request.segments else None,
            scale=scale,
            is_causal=True,
            local_window_size=window,
            implementation="cudnn",
        )

    return attend
