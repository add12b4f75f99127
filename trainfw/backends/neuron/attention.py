"""NKI attention kernels behind the form of attention that models call. None of it has run on Neuron hardware.

neuronx-cc's own flash attention (`neuronxcc.nki.kernels`) is not among them: that namespace no longer compiles since
NKI 0.4 (aws-neuron-sdk 2.30), before which there is no JAX that trainfw takes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from trainfw.backends.base import AttentionRequest

Attend = Callable[..., Any]

_PARTITIONS = 128


def ring_refuses(request: AttentionRequest) -> str | None:
    """nkilib's `ring_attention_spmd_fwd` (aws-neuron/nki-library experimental/attention/ring_attention_fwd.py)."""
    if request.ring == 1:
        return "the sequence is not split"
    return "trainfw does not split sequences yet, and how JAX hands replica groups to the kernel is not documented"


def load_ring(request: AttentionRequest) -> Attend:
    raise ImportError("no adapter")


def nkilib_refuses(request: AttentionRequest) -> str | None:
    """What nkilib's `attention_cte` and `attention_bwd` cannot do.

    aws-neuron/nki-library 0759719d src/nkilib_src/nkilib/core/attention.
    """
    if problem := _common_problem(request):
        return problem
    if request.segments:
        return "it has no argument for segments"
    if request.window is not None and request.window < request.key_length:
        return "forward and backward document windows that differ by one"
    if request.key_length % 512 or request.query_length % _PARTITIONS:
        return f"sequence length {request.key_length} is not a multiple of 512"
    return None


def _common_problem(request: AttentionRequest) -> str | None:
    if request.ring > 1:
        return "the sequence is split"
    if request.cached:
        return "it has no argument for a cache's length"
    if request.softcap is not None:
        return "it has no argument for a softcap"
    if request.dtype != "bfloat16":
        return f"it multiplies in bfloat16, not {request.dtype}"
    if request.head_dim > _PARTITIONS:
        return f"head dim {request.head_dim} is more than {_PARTITIONS}"
    if not request.causal or request.query_length != request.key_length:
        return "it is called for causal self-attention only"
    return None


def _lnc(request: AttentionRequest) -> int:
    if request.lnc is not None:
        return request.lnc
    import jax

    return 2 if jax.devices()[0].device_kind in ("NC_v3d", "NC_v4d") else 1  # as in hardware/chips


def load_nkilib(request: AttentionRequest) -> Attend:
    """nkilib's flash attention: `attention_cte` forward, `attention_bwd` backward, kv heads as they are.

    How kernels of `@nki.jit` are launched: aws-neuron-sdk 2.32.0 release-notes (`kernel[2]` for LNC 2).
    """
    attention_cte = importlib.import_module("nkilib.core.attention.attention_cte").attention_cte
    attention_bwd = importlib.import_module("nkilib.core.attention.attention_bwd").attention_bwd
    if (lnc := _lnc(request)) > 1:
        attention_cte, attention_bwd = attention_cte[lnc], attention_bwd[lnc]

    import jax
    import jax.numpy as jnp

    def forward(q_BSHh: Any, k_BTKh: Any, v_BTKh: Any, scale: float) -> tuple[Any, Any]:
        B, S, H, h = q_BSHh.shape
        K = k_BTKh.shape[2]
        q_NSh = q_BSHh.transpose(0, 2, 1, 3).reshape(B * H, S, h)
        k_NTh, v_NTh = (x.transpose(0, 2, 1, 3).reshape(B * K, -1, h) for x in (k_BTKh, v_BTKh))
        o_NSh, negative_max, reciprocal = attention_cte(
            q_NSh, k_NTh, v_NTh, scale=scale, causal_mask=True, tp_q=True, tp_k=True, cache_softmax=True
        )
        # (B * H, 128, S / 128) each: query s is at [s % 128, s // 128], as attention_bwd reads them.
        lse = -(negative_max + jnp.log(reciprocal)).reshape(B, H, _PARTITIONS, S // _PARTITIONS)
        o_BSHh = o_NSh.reshape(B, H, S, h).transpose(0, 2, 1, 3)
        return o_BSHh, (q_BSHh, k_BTKh, v_BTKh, o_BSHh, lse)

    def backward(scale: float, saved: Any, do_BSHh: Any) -> tuple[Any, ...]:
        *arrays, lse = saved
        q, k, v, o, do = (x.transpose(0, 2, 3, 1) for x in (*arrays, do_BSHh))
        grads = attention_bwd(q, k, v, o, do, lse, use_causal_mask=True, mixed_precision=True, softmax_scale=scale)
        return tuple(grad.transpose(0, 3, 1, 2) for grad in grads)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def flash(q_BSHh: Any, k_BTKh: Any, v_BTKh: Any, scale: float) -> Any:
        return forward(q_BSHh, k_BTKh, v_BTKh, scale)[0]

    flash.defvjp(forward, backward)

    def attend(
        q_BSHh: Any, k_BTKh: Any, v_BTKh: Any, mask_BST: Any, *, scale: float, softcap: float | None = None
    ) -> Any:
        assert softcap is None
        return flash(q_BSHh, k_BTKh, v_BTKh, scale)

    return attend
