"""NKI attention kernels behind the form of attention that models call. None of it has run on Neuron hardware.

neuronx-cc's own flash attention (`neuronxcc.nki.kernels`) is not among them: that namespace no longer compiles since
NKI 0.4 (aws-neuron-sdk 2.30), before which there is no JAX that trainfw takes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from trainfw.backends.base import AttentionRequest
from trainfw.backends.neuron.sdk import version_parts

Bounds: TypeAlias = tuple[Array, Array] | None

_PARTITIONS = 128
_MOST_ROWS_AND_HEADS, _LONGEST = 512, 131_072
"""Limits of one call of `attention_cte`, which asserts both (`_MAX_BS`, `_MAX_SEQLEN`)."""
_WITHOUT_BRACKETS = (0, 7)
"""NKI version from which a kernel's LNC is the compiler's (NCC_EVRF066), and `kernel[lnc]` deprecated (aws-neuron-sdk
2.33 release notes)."""
_BOUNDS = {"bound_min", "bound_max"}
"""Arguments of both kernels for packed sequences: from nki-library d2ad3a57 (2026-04-13) on."""


def nkilib_refuses(request: AttentionRequest) -> str | None:
    """Say why nkilib's `attention_cte` and `attention_bwd` cannot do what is asked.

    aws-neuron/nki-library 0759719d and d2ad3a57 src/nkilib_src/nkilib/core/attention.
    """
    length, heads = request.key_length, request.num_heads
    rows = 1 if request.segments else request.batch  # those with documents of their own are a call each
    reasons = {
        "it has no argument for a softcap": request.softcap is not None,
        f"it multiplies in bfloat16, not {request.dtype}": request.dtype != "bfloat16",
        f"head dim {request.head_dim} is more than {_PARTITIONS}": request.head_dim > _PARTITIONS,
        "it is called for causal self-attention only": not request.causal or request.query_length != length,
        "forward and backward document windows that differ by one": (request.window or length) < length,
        f"sequence length {length} is not a multiple of 512": length % 512 or request.query_length % _PARTITIONS,
        f"sequence length {length:,} is more than {_LONGEST:,}": length > _LONGEST,
        f"{rows} rows x {heads} heads are more than {_MOST_ROWS_AND_HEADS}": rows * heads > _MOST_ROWS_AND_HEADS,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        return reason
    try:
        kernels = _kernels()
    except ImportError:
        return None  # for `load_nkilib` to say
    if request.segments and not all(_arguments(kernel) >= _BOUNDS for kernel in kernels):
        return "this nki-library has no arguments for segments (bound_min, bound_max)"
    return _lnc_problem(_lnc(request))


def _kernels() -> tuple[Any, Any]:
    """Import the kernels (forward, backward). Raises ImportError where nki-library is not installed."""
    return (
        importlib.import_module("nkilib.core.attention.attention_cte").attention_cte,
        importlib.import_module("nkilib.core.attention.attention_bwd").attention_bwd,
    )


def _arguments(kernel: Any) -> set[str]:
    """List the names of a kernel's arguments: of the function that `@nki.jit` wraps, wherever it keeps it."""
    names: set[str] = set()
    for function in (kernel, *(getattr(kernel, name, None) for name in ("func", "fn", "function", "__wrapped__"))):
        try:
            names |= set(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # nothing there, or nothing to call
            continue
    return names


def _nki_version() -> tuple[int, ...]:
    """Read the version of nki; empty where it is not installed as a distribution."""
    try:
        return tuple(version_parts(importlib.metadata.version("nki")))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _takes_lnc_from_environment() -> bool:
    return _nki_version()[:2] >= _WITHOUT_BRACKETS


def _lnc_problem(lnc: int) -> str | None:
    name = "NEURON_LOGICAL_NC_CONFIG"
    told = os.environ.get(name) or "1"
    if told == str(lnc) or not _takes_lnc_from_environment():
        return None
    said = f"is {told}" if os.environ.get(name) else "is unset, which it takes for 1"
    return f"NKI from 0.7 on takes a kernel's LNC from {name}, which {said}; the devices have LNC {lnc}: set it to that"


def _lnc(request: AttentionRequest) -> int:
    if request.lnc is not None:
        return request.lnc
    return 2 if jax.devices()[0].device_kind in ("NC_v3d", "NC_v4d") else 1  # as in hardware/chips


def load_nkilib(request: AttentionRequest) -> Callable[..., Array]:
    """Load nkilib's flash attention: `attention_cte` forward, `attention_bwd` backward, kv heads as they are.

    Launched as `kernel[lnc]` before NKI 0.7 and by its name from then on (`_lnc_problem`). Documents packed into rows
    are bounds of what each query sees; `attention_cte` has them for all rows of a call, hence one call a row.
    """
    attention_cte, attention_bwd = _kernels()
    lnc = _lnc(request)
    if lnc > 1 and not _takes_lnc_from_environment():
        attention_cte, attention_bwd = attention_cte[lnc], attention_bwd[lnc]

    def forward_rows(q_BSHh: Array, k_BTKh: Array, v_BTKh: Array, scale: float, **bounds: Array) -> tuple[Array, Array]:
        """Return o_BSHh, and the logarithms of the softmax's sums as `attention_bwd` reads them."""
        B, S, H, h = q_BSHh.shape
        K = k_BTKh.shape[2]
        q_NSh = q_BSHh.transpose(0, 2, 1, 3).reshape(B * H, S, h)
        k_NTh, v_NTh = (x.transpose(0, 2, 1, 3).reshape(B * K, -1, h) for x in (k_BTKh, v_BTKh))
        o_NSh, negative_max, reciprocal = attention_cte(
            q_NSh, k_NTh, v_NTh, scale=scale, causal_mask=True, tp_q=True, tp_k=True, cache_softmax=True, **bounds
        )
        # (B * H, 128, S / 128) each: query s is at [s % 128, s // 128], as attention_bwd reads them.
        lse = -(negative_max + jnp.log(reciprocal)).reshape(B, H, _PARTITIONS, S // _PARTITIONS)
        return o_NSh.reshape(B, H, S, h).transpose(0, 2, 1, 3), lse

    def forward(q_BSHh: Array, k_BTKh: Array, v_BTKh: Array, bounds_BS: Bounds, scale: float) -> tuple[Array, Any]:
        arrays = (q_BSHh, k_BTKh, v_BTKh)
        if bounds_BS is None:
            o_BSHh, lse = forward_rows(*arrays, scale)
        else:
            rows = []
            for row in range(q_BSHh.shape[0]):
                low_S1, high_S1 = (bound_BS[row, :, None] for bound_BS in bounds_BS)
                q, k, v = (x[row : row + 1] for x in arrays)
                rows.append(forward_rows(q, k, v, scale, bound_min=low_S1, bound_max=high_S1))
            o_BSHh, lse = (jnp.concatenate(parts) for parts in zip(*rows, strict=True))
        return o_BSHh, (*arrays, o_BSHh, lse, bounds_BS)

    def backward(scale: float, saved: Any, do_BSHh: Any) -> tuple[Any, ...]:
        *arrays, lse, bounds_BS = saved
        q, k, v, o, do = (x.transpose(0, 2, 3, 1) for x in (*arrays, do_BSHh))
        packed = {} if bounds_BS is None else {"bound_min": bounds_BS[0], "bound_max": bounds_BS[1]}
        grads = attention_bwd(
            q, k, v, o, do, lse, use_causal_mask=True, mixed_precision=True, softmax_scale=scale, **packed
        )
        return *(grad.transpose(0, 3, 1, 2) for grad in grads), None if bounds_BS is None else (None, None)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def flash(q_BSHh: Array, k_BTKh: Array, v_BTKh: Array, bounds_BS: Bounds, scale: float) -> Array:
        return forward(q_BSHh, k_BTKh, v_BTKh, bounds_BS, scale)[0]

    flash.defvjp(forward, backward)

    def attend(
        q_BSHh: Array, k_BTKh: Array, v_BTKh: Array, mask_BST: Array, *, scale: float, softcap: float | None = None
    ) -> Array:
        assert softcap is None
        bounds_BS = key_bounds(mask_BST, q_BSHh.shape[0]) if request.segments else None
        return flash(q_BSHh, k_BTKh, v_BTKh, bounds_BS, scale)

    return attend


def key_bounds(mask_BST: Array, rows: int) -> tuple[Array, Array]:
    """Find the first key of each query's document, and the one after its last, f32[rows, S] each.

    Documents are runs of neighbours, as batches have them: of a causal mask over them, a row's sum is how far a query
    stands in its document, and a column's how much of the document follows. A query that sees nothing, which is
    padding, sees itself.
    """
    indices_S = jnp.arange(mask_BST.shape[1])
    seen_BS, seeing_BS = (jnp.maximum(jnp.sum(mask_BST, axis=axis, dtype=jnp.int32), 1) for axis in (2, 1))
    bounds_BS = indices_S + 1 - seen_BS, indices_S + seeing_BS
    return tuple(jnp.broadcast_to(bound.astype(jnp.float32), (rows, indices_S.size)) for bound in bounds_BS)  # type: ignore[return-value]
