"""Attention over a sequence that lies split along a mesh axis, as each device runs it (inside `jax.shard_map`).

Columns are dealt in zig-zag (Llama 3, arXiv:2407.21783, section 3.3.2): of 2 * parts chunks, device c holds chunk c,
its early half, and chunk 2 * parts - 1 - c, its late half. Whoever holds it, a late half comes after every early one;
so between two devices exactly two of the four products of halves are seen at all, on whichever device:

- late queries, early keys: all of it;
- early queries, early keys where the keys' device comes first along the axis, else late queries, late keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.parallel.collectives import all_gather, axis_index, axis_size, ring_shift
from trainfw.scopes import ATTENTION

Tree = TypeVar("Tree")
Sums = TypeVar("Sums")


def zigzag_order(length: int, parts: int) -> np.ndarray:
    """List the columns of a sequence in the order in which `parts` devices hold them, i64[length]."""
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)


def local_indices(length: int, axis: str = "context") -> jax.Array:
    """Compute the places in the whole sequence of the `length` columns of this device, i32[length]."""
    size = axis_size(axis)
    if size == 1:
        return jnp.arange(length, dtype=jnp.int32)
    n, place = length // 2, axis_index(axis)
    early = jnp.arange(n, dtype=jnp.int32)
    return jnp.concatenate([place * n + early, (2 * size - 1 - place) * n + early])


def causal_mask(
    query_indices_S: jax.Array,
    key_indices_T: jax.Array,
    query_segments_BS: jax.Array | None = None,
    key_segments_BT: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Compute which query sees which key, bool[B or 1, S, T]: by index, within a segment. Windows count the query."""
    query_S1, key_1T = query_indices_S[:, None], key_indices_T[None, :]
    seen_BST = (key_1T <= query_S1)[None]
    if window is not None:
        seen_BST &= (key_1T > query_S1 - window)[None]
    if query_segments_BS is not None and key_segments_BT is not None:
        seen_BST &= query_segments_BS[:, :, None] == key_segments_BT[:, None, :]
    return seen_BST


@jax.named_scope(ATTENTION)
def gathered_attention(
    q_BSHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    *,
    axis: str,
    indices_S: jax.Array,
    segment_ids_BS: jax.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    attend: Callable[..., jax.Array],
) -> jax.Array:
    """Compute the result of `ring_attention` from keys and values gathered along `axis`: more memory, one exchange.

    Early queries are given early keys only: three quarters of the products. `attend` is called as
    `attend(q_BSHh, k_BTKh, v_BTKh, mask_BST, scale=scale, softcap=softcap)`.
    """
    queries = (q_BSHh, indices_S[None], segment_ids_BS)
    everyone = jax.tree.map(lambda x: all_gather(x, axis, 1), (k_BSKh, v_BSKh, indices_S[None], segment_ids_BS))
    parts = axis_size(axis)

    def early(x: jax.Array) -> jax.Array:
        halves = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
        return halves[:, :, 0].reshape(x.shape[0], -1, *x.shape[2:])

    def run(queries: _Queries, keys: _Keys) -> jax.Array:
        (q, *_), (k, v, *_) = queries, keys
        return attend(q, k, v, _seen(queries, keys, window), scale=scale, softcap=softcap)

    if parts == 1:
        return run(queries, everyone)
    first, last = _halves(queries)
    return jnp.concatenate([run(first, jax.tree.map(early, everyone)), run(last, everyone)], axis=1)


@jax.named_scope(ATTENTION)
def ring_attention(
    q_BSHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    *,
    axis: str,
    indices_S: jax.Array,
    segment_ids_BS: jax.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Attend causally from this device's queries to every device's keys, which travel round `axis`: o_BSHh.

    Ring attention (arXiv:2310.01889) with the online softmax of FlashAttention-2 (arXiv:2307.08691), whose backward
    pass it also takes: a second circle, on which the gradients of keys and values travel with them. Scores and softmax
    are f32, operands of products as narrow as the inputs. A device holds the scores of two halves at a time.

    Args:
        axis: over which the sequence is split; along one of size 1 this is plain attention.
        indices_S: where in the whole sequence the columns are: `local_indices`.
        segment_ids_BS: tokens see only tokens of their own segment.
        window: of how many tokens, counting itself, a token sees at most the last ones.
        softcap: scores are bounded by it.
    """
    form = _Form(axis, window, scale, softcap)
    return _ring(form, q_BSHh, k_BSKh, v_BSKh, indices_S, segment_ids_BS)


_UNSEEN = -1e30
"""The score of a key that is not seen: finite, so that differences of two are no NaN."""


class _Form(NamedTuple):
    axis: str
    window: int | None
    scale: float
    softcap: float | None


_Queries: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None]
"""q_BSKGh, indices_1S, segment_ids_BS."""
_Keys: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""k_BTKh, v_BTKh, indices_1T, segment_ids_BT."""
_Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Sums over scores so far: the highest, the sum of exponentials (BKGS), the values weighted by these (BKGSh); f32."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    form: _Form, q: jax.Array, k: jax.Array, v: jax.Array, indices: jax.Array, segments: jax.Array | None
) -> jax.Array:
    return _forward(form, q, k, v, indices, segments)[0]


def _forward(
    form: _Form, q: jax.Array, k: jax.Array, v: jax.Array, indices: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, tuple[object, ...]]:
    size = axis_size(form.axis)
    queries: list[_Queries] = _parts((_grouped(q, k), indices[None], segments), size)
    keys: _Keys = (k, v, indices[None], segments)
    arriving = _shift(keys, form)
    sums: list[_Sums] = []
    for i, query in enumerate(queries):
        nothing = jnp.zeros_like(jnp.moveaxis(query[0], 1, 3), jnp.float32)
        sums, found = _in_turn(sums, (jnp.full(nothing.shape[:-1], _UNSEEN), nothing[..., 0], nothing))
        # The diagonal first: every token sees itself, so that the highest score is from here on one that is seen.
        for key in reversed(_parts(keys, size)[: i + 1]):
            found = _attend(form, found, query, key)
        sums.append(found)
    for away in range(1, size):
        # The next keys wait for no product of this round: both may run at once. None are needed after the last.
        keys, arriving = arriving, _shift(arriving, form) if away < size - 1 else arriving
        before = axis_index(form.axis) >= away
        (early, late), (early_query, late_query), (early_key, late_key) = sums, queries, _halves(keys)
        late = _attend(form, late, late_query, early_key)
        found = _attend(
            form,
            _pick(before, early, late),
            _pick(before, early_query, late_query),
            _pick(before, early_key, late_key),
        )
        sums = [_pick(before, found, early), _pick(before, late, found)]
    out = jnp.concatenate([jnp.moveaxis(values / total[..., None], 3, 1) for _, total, values in sums], axis=1)
    out = out.reshape(q.shape).astype(q.dtype)
    return out, (q, k, v, indices, segments, out, [highest + jnp.log(total) for highest, total, _ in sums])


def _backward(form: _Form, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    # Else the compiler sees that forward made the same scores and received the same keys, and keeps them all.
    saved, cotangent = jax.lax.optimization_barrier((saved, cotangent))
    q, k, v, indices, segments, out, logs = saved
    size = axis_size(form.axis)
    rows = _parts((_grouped(q, k), indices[None], segments, _grouped(cotangent, k), _grouped(out, k)), size)
    products = [row[3].astype(jnp.float32) * row[4].astype(jnp.float32) for row in rows]
    dots = [jnp.moveaxis(product.sum(axis=-1), 1, -1) for product in products]
    queries = [(row[:3], row[3], log, dot) for row, log, dot in zip(rows, logs, dots, strict=True)]
    keys: _Keys = (k, v, indices[None], segments)
    arriving = _shift(keys, form)
    halves = _parts(keys, size)
    of_queries = [jnp.zeros_like(row[0], jnp.float32) for row in rows]
    of_keys: list[Any] = [(0.0, 0.0)] * len(halves)
    for i, row in enumerate(queries):
        for j in range(i + 1):
            of_queries, query = _in_turn(of_queries, row)
            dq, dkv = _gradients(form, query, halves[j])
            of_queries[i], of_keys[j] = of_queries[i] + dq, _add(of_keys[j], dkv)
    travelling = _join(of_keys)
    for away in range(1, size):
        keys, arriving = arriving, _shift(arriving, form) if away < size - 1 else arriving
        # What others have added to the gradients of these keys; it, too, may come while this round's products run.
        travelling = _shift(travelling, form)
        before = axis_index(form.axis) >= away
        (early_query, late_query), (early_key, late_key) = queries, _halves(keys)
        of_queries, query = _in_turn(of_queries, late_query)
        dq, of_early = _gradients(form, query, early_key)
        of_queries, query = _in_turn([of_queries[0], of_queries[1] + dq], _pick(before, early_query, late_query))
        made = _gradients(form, query, _pick(before, early_key, late_key))
        nothing = jax.tree.map(jnp.zeros_like, made)
        (dq_early, dkv_early), (dq_late, dkv_late) = _pick(before, made, nothing), _pick(before, nothing, made)
        of_queries = [of_queries[0] + dq_early, of_queries[1] + dq_late]
        travelling = _add(travelling, _join([_add(of_early, dkv_early), dkv_late]))
    dk, dv = _shift(travelling, form)  # home
    dq = _join(of_queries).reshape(q.shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)


def _attend(form: _Form, sums: _Sums, query: _Queries, key: _Keys) -> _Sums:
    sums, query = _in_turn(sums, query)
    highest, total, values = sums
    scores = _mask(form, query, key, _product("bskgh,btkh->bkgst", query[0], key[0]))
    higher = jnp.maximum(highest, scores.max(axis=-1))
    weights, old = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
    values = values * old[..., None] + _product("bkgst,btkh->bkgsh", weights.astype(key[1].dtype), key[1])
    return higher, total * old + weights.sum(axis=-1), values


def _gradients(form: _Form, query: Any, key: _Keys) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute (dq_BSKGh, (dk_BTKh, dv_BTKh)) of these queries' products with these keys, in f32."""
    (q, *_), (k, v, *_) = query[0], key
    _, dout, log, dots = query
    scores, back = jax.vjp(functools.partial(_mask, form, query[0], key), _product("bskgh,btkh->bkgst", q, k))
    weights = jnp.exp(scores - log[..., None])
    dv = _product("bkgst,bskgh->btkh", weights.astype(dout.dtype), dout)
    dweights = _product("bskgh,btkh->bkgst", dout, v)
    dscores = back(weights * (dweights - dots[..., None]))[0].astype(q.dtype)
    dq, dk = _product("bkgst,btkh->bskgh", dscores, k), _product("bkgst,bskgh->btkh", dscores, q)
    return jax.lax.optimization_barrier((dq, (dk, dv)))  # together, so that no scores are kept for one of them


def _mask(form: _Form, query: _Queries, key: _Keys, products: jax.Array) -> jax.Array:
    scores = products * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    return jnp.where(_seen(query, key, form.window)[:, None, None], scores, _UNSEEN)


def _seen(query: _Queries, key: _Keys, window: int | None) -> jax.Array:
    (*_, query_indices, query_segments), (*_, key_indices, key_segments) = query, key
    return causal_mask(query_indices[0], key_indices[0], query_segments, key_segments, window)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _grouped(x_BSHh: jax.Array, k_BSKh: jax.Array) -> jax.Array:
    B, S, _, h = x_BSHh.shape
    return x_BSHh.reshape(B, S, k_BSKh.shape[2], -1, h)


def _in_turn(sums: Sums, tree: Tree) -> tuple[Sums, Tree]:
    """Return both as they are, but products of `tree` wait for the sums: the scores before are gone by then."""
    return jax.lax.optimization_barrier((sums, tree))


def _shift(tree: Tree, form: _Form) -> Tree:
    return jax.tree.map(lambda x: ring_shift(x, form.axis), tree)


def _parts(tree: Tree, size: int) -> list[Tree]:
    return _halves(tree) if size > 1 else [tree]


def _halves(tree: Tree) -> list[Tree]:
    """Cut columns into the early and the late half."""
    return [jax.tree.map(lambda x, i=i: jnp.split(x, 2, axis=1)[i], tree) for i in (0, 1)]


def _join(parts: list[Tree]) -> Tree:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def _pick(condition: jax.Array, tree: Tree, other: Tree) -> Tree:
    return jax.tree.map(functools.partial(jnp.where, condition), tree, other)


def _add(tree: Tree, other: Tree) -> Tree:
    return jax.tree.map(jnp.add, tree, other)
