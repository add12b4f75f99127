"""Attention that never holds all scores: a block of queries at a time, with all keys, or causal those up to its end.

The forward pass keeps each row's log-sum-exp, from which the backward pass computes a block's weights anew (Dao,
FlashAttention-2, arXiv:2307.08691, without the blocks of keys: a block's rows are whole). On the CPU, for which this
is, scores that fit its caches take half the time of those that go through memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from trainfw.backends.base import ATTENDED, AttentionRequest
from trainfw.backends.cpu.products import product, row_major

_LEAST, _MOST = 128, 16
"""Queries in a block at least, and blocks at most (every one is compiled)."""


def refuses(request: AttentionRequest) -> str | None:
    """Say why this cannot do what is asked."""
    if request.causal and request.query_length != request.key_length:
        return "causal, it is for queries that each have a key"
    return None


def load(request: AttentionRequest) -> Callable[..., Array]:
    return functools.partial(blocked_attend, causal=request.causal)


def blocks_of(queries: int) -> list[tuple[int, int]]:
    """List the blocks: the first query of each, and the first after it."""
    size = max(_LEAST, -(-queries // _MOST))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def blocked_attend(
    q_BSHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    mask_BST: Array | None,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
) -> Array:
    """Compute `trainfw.models.common.attention.attend`.

    Args:
        mask_BST: which query sees which key; None: all that are left. A query that sees none gets the mean of the
            values, which get no gradient of it.
        causal: leave out keys after a query's block, of which it sees none: there are as many queries as keys.
    """
    return _forward(q_BSHh, k_BTKh, v_BTKh, mask_BST, scale, softcap, causal)[0]


def _heads_first(x_BSHh: Array, num_kv_heads: int) -> Array:
    """Return x_BKGSh, in memory in this order."""
    B, S, _, h = x_BSHh.shape
    return row_major(x_BSHh.reshape(B, S, num_kv_heads, -1, h).transpose(0, 2, 3, 1, 4))


def _heads_last(x_BKGSh: Array) -> Array:
    B, _, _, S, h = x_BKGSh.shape
    return x_BKGSh.transpose(0, 3, 1, 2, 4).reshape(B, S, -1, h)


def _scores(q_BKGsh: Array, k_BKth: Array, scale: float, softcap: float | None) -> Array:
    scores_BKGst = product("bkgsh,bkth->bkgst", q_BKGsh, k_BKth) * scale
    return scores_BKGst if softcap is None else softcap * jnp.tanh(scores_BKGst / softcap)


def _over_queries(x_BKGst: Array, y_BKGsh: Array) -> Array:
    """Sum the products of all heads that share keys over the queries: f32[B, K, t, h]."""
    B, K, _, _, t = x_BKGst.shape
    x_BKnt, y_BKnh = x_BKGst.reshape(B, K, -1, t), y_BKGsh.reshape(B, K, -1, y_BKGsh.shape[-1])
    return product("bktn,bknh->bkth", row_major(x_BKnt.swapaxes(-1, -2)), y_BKnh)


def _forward(
    q_BSHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    mask_BST: Array | None,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> tuple[Array, tuple[object, ...]]:
    T, K = k_BTKh.shape[1:3]
    if q_BSHh.dtype != jnp.float32:
        # Turned by itself: together with rope's narrowing XLA does it number by number.
        q_BSHh, k_BTKh = jax.lax.optimization_barrier((q_BSHh, k_BTKh))
    q_BKGSh = _heads_first(q_BSHh, K)
    k_BKTh, v_BKTh = (_heads_first(x, K)[:, :, 0] for x in (k_BTKh, v_BTKh))
    # As the backward pass reads them too, so that nothing is turned round twice.
    q_BKGSh, k_BKTh, v_BKTh = checkpoint_name((q_BKGSh, k_BKTh, v_BKTh), ATTENDED)
    outs: list[Array] = []
    logs: list[Array] = []
    for start, stop in blocks_of(q_BKGSh.shape[3]):
        q_BKGsh = q_BKGSh[:, :, :, start:stop]
        if outs:  # one block after the other, or the scores of all are there at once
            q_BKGsh, outs[-1] = jax.lax.optimization_barrier((q_BKGsh, outs[-1]))
        seen = stop if causal else T
        scores_BKGst = _scores(q_BKGsh, k_BKTh[:, :, :seen], scale, softcap)
        if mask_BST is not None:
            # Finite, so that a row which sees nothing is a plain average rather than NaN.
            scores_BKGst = jnp.where(mask_BST[:, None, None, start:stop, :seen], scores_BKGst, -1e30)
        top_BKGs1 = jnp.max(scores_BKGst, axis=-1, keepdims=True)
        weights_BKGst = jnp.exp(scores_BKGst - top_BKGs1)
        sum_BKGs1 = jnp.sum(weights_BKGst, axis=-1, keepdims=True)
        weights_BKGst = weights_BKGst.astype(v_BKTh.dtype)
        outs.append(product("bkgst,bkth->bkgsh", weights_BKGst, v_BKTh[:, :, :seen]) / sum_BKGs1)
        logs.append(top_BKGs1 + jnp.log(sum_BKGs1))
    o_BKGSh, log_BKGS1 = jnp.concatenate(outs, axis=3), jnp.concatenate(logs, axis=3)
    o_BKGSh, log_BKGS1 = checkpoint_name((o_BKGSh.astype(q_BSHh.dtype), log_BKGS1), ATTENDED)
    return _heads_last(o_BKGSh), (q_BKGSh, k_BKTh, v_BKTh, mask_BST, o_BKGSh, log_BKGS1)


def _backward(
    scale: float, softcap: float | None, causal: bool, kept: tuple[Array, ...], do_BSHh: Array
) -> tuple[Array, Array, Array, None]:
    q_BKGSh, k_BKTh, v_BKTh, mask_BST, o_BKGSh, log_BKGS1 = kept
    do_BKGSh = _heads_first(do_BSHh, k_BKTh.shape[1])
    # A product: XLA takes 16 times as long for sums of so few numbers.
    own_BKGS1 = jnp.einsum("bkgsh,bkgsh->bkgs", *(x.astype(jnp.float32) for x in (do_BKGSh, o_BKGSh)))[..., None]
    blocks, dtype, T = blocks_of(q_BKGSh.shape[3]), do_BSHh.dtype, k_BKTh.shape[2]
    parts = blocks if causal else [(0, T)]  # of the keys: each is seen by the blocks of queries that reach its end
    dqs: list[Array] = []
    dks: list[list[Array]] = [[] for _ in parts]
    dvs: list[list[Array]] = [[] for _ in parts]
    for start, stop in blocks:
        block = (slice(None),) * 3 + (slice(start, stop),)
        seen = stop if causal else T
        k_BKth, v_BKth = k_BKTh[:, :, :seen], v_BKTh[:, :, :seen]
        q_BKGsh, do_BKGsh = q_BKGSh[block], do_BKGSh[block]
        if dqs:
            q_BKGsh, do_BKGsh, dqs[-1] = jax.lax.optimization_barrier((q_BKGsh, do_BKGsh, dqs[-1]))
        scores_BKGst = _scores(q_BKGsh, k_BKth, scale, softcap)
        dweights_BKGst = product("bkgsh,bkth->bkgst", do_BKGsh, v_BKth)
        weights_BKGst = jnp.exp(scores_BKGst - log_BKGS1[block])
        if mask_BST is not None:
            weights_BKGst = jnp.where(mask_BST[:, None, None, start:stop, :seen], weights_BKGst, 0.0)
        dscores_BKGst = weights_BKGst * (dweights_BKGst - own_BKGS1[block]) * scale
        if softcap is not None:
            dscores_BKGst *= 1.0 - jnp.square(scores_BKGst / softcap)
        # Computed once, and not again in each product that reads them in an order of its own.
        weights_BKGst, dscores_BKGst = jax.lax.optimization_barrier(
            (weights_BKGst.astype(dtype), dscores_BKGst.astype(dtype))
        )
        dqs.append(product("bkgst,bkth->bkgsh", dscores_BKGst, k_BKth))
        dk_BKth = _over_queries(dscores_BKGst, q_BKGsh)
        dv_BKth = _over_queries(weights_BKGst, do_BKGsh)
        for (first, last), of_k, of_v in zip(parts, dks, dvs):
            if last <= seen:
                of_k.append(dk_BKth[:, :, first:last])
                of_v.append(dv_BKth[:, :, first:last])
    dk_BKTh, dv_BKTh = (jnp.concatenate([sum(shares) for shares in of], axis=2) for of in (dks, dvs))
    dq_BKGSh = jnp.concatenate(dqs, axis=3)
    dq, dk, dv = (_heads_last(x.astype(dtype)) for x in (dq_BKGSh, dk_BKTh[:, :, None], dv_BKTh[:, :, None]))
    return dq, dk, dv, None


blocked_attend.defvjp(_forward, _backward)
