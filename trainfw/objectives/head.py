"""The output head's losses, without ever holding whole logits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainfw.models import HeadDims, TokenModel, over_rows, softcap
from trainfw.parallel import all_gather, all_max, all_reduce, axis_index, axis_size
from trainfw.scopes import LOSS, LOSS_GRADIENT


class Head(NamedTuple):
    """Settings by which logits are made of hidden states and the head's weight, `chunk` tokens at a time."""

    dims: HeadDims
    softcap: float | None
    learns: bool
    chunk: int

    def logits(self, x_nD: jax.Array, w: jax.Array) -> jax.Array:
        logits_nV = jnp.einsum(f"nd,{self.dims}->nv", x_nD, w, preferred_element_type=jnp.float32)
        return softcap(logits_nV, self.softcap)

    def rows(self, w: jax.Array) -> jax.Array:
        """Number the rows of the vocabulary that this device has, i32[V]."""
        count = w.shape[self.dims.index("v")]
        return axis_index("tensor") * count + jnp.arange(count, dtype=jnp.int32)


def head_inputs(model: TokenModel, x_BSD: jax.Array, chunk: int) -> tuple[Head, jax.Array, jax.Array]:
    """Return (the model's head, the hidden states x_ND of all tokens, the head's weight)."""
    x_ND = all_gather(x_BSD, "tensor", 1).reshape(-1, x_BSD.shape[-1])
    weight, dims = model.head_weight()
    return Head(dims, model.final_softcap, model.head_learns, chunk), x_ND, weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(
    head: Head, z_loss: float, x_ND: jax.Array, w: jax.Array, targets_N: jax.Array, mask_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(nats + z_loss * log(Z)^2, nats), summed over the tokens; only the first has a gradient.

    The vocabulary is split over `tensor` (Shoeybi et al., arXiv:1909.08053, section 3), and the logits of `chunk`
    tokens exist at a time. Where a gradient is wanted it is computed along with them, so that they are neither kept
    nor computed twice (Hsu et al., Liger Kernel, arXiv:2410.10989, section 3.2).
    """
    return _by_chunk(head, z_loss, x_ND, w, targets_N, mask_N, differentiate=False)[0]


def _by_chunk(
    head: Head,
    z_loss: float,
    x_ND: jax.Array,
    w: jax.Array,
    targets_N: jax.Array,
    mask_N: jax.Array,
    *,
    differentiate: bool = True,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """The sums, and where they are wanted the gradients (dx_ND, dw or None) of the first."""
    chunks, row_V = loss_chunks(x_ND.shape[0], head.chunk), head.rows(w)

    @jax.named_scope(LOSS)
    def step(sums: Any, part: Any) -> tuple[Any, Any]:
        x_nD, targets_n, mask_n = part
        logits_nV = head.logits(x_nD, w)
        top_n = all_max(jnp.max(logits_nV, axis=-1), "tensor")
        exp_nV = jnp.exp(logits_nV - top_n[:, None])
        hit_nV = row_V == targets_n[:, None]
        z_n = jnp.sum(exp_nV, axis=-1)
        if axis_size("tensor") == 1:
            target_n = jnp.take_along_axis(logits_nV, targets_n[:, None], axis=-1, mode="clip")[:, 0]
        else:  # a masked sum stays local where the vocabulary is split
            target_n = jnp.sum(jnp.where(hit_nV, logits_nV, 0.0), axis=-1)
            z_n, target_n = all_reduce(jnp.stack([z_n, target_n]), "tensor")
        log_z_n = top_n + jnp.log(z_n)
        nats = jnp.sum((log_z_n - target_n) * mask_n)
        objective = nats + z_loss * jnp.sum(jnp.square(log_z_n) * mask_n)
        if not differentiate:
            return (sums[0] + objective, sums[1] + nats, None), None
        of_z_n = mask_n * (1.0 + 2.0 * z_loss * log_z_n)
        d_nV = exp_nV * (of_z_n / z_n)[:, None] - jnp.where(hit_nV, mask_n[:, None], 0.0)
        if head.softcap is not None:
            d_nV = d_nV * (1.0 - jnp.square(logits_nV / head.softcap))
        d_nV = d_nV.astype(x_nD.dtype)
        dw = None
        with jax.named_scope(LOSS_GRADIENT):
            # In float32 first, as every backend sums it.
            dx_nD = jnp.einsum(f"nv,{head.dims}->nd", d_nV, w, preferred_element_type=jnp.float32).astype(x_nD.dtype)
            if head.learns:
                dw = over_rows(d_nV, x_nD) if head.dims == "vd" else over_rows(x_nD, d_nV)
                dw = dw if sums[2] is None else sums[2] + dw
        return (sums[0] + objective, sums[1] + nats, dw), dx_nD

    parts = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), (x_ND, targets_N, mask_N))
    sums: Any = (jnp.float32(0), jnp.float32(0), None)
    if chunks == 1 or (differentiate and head.learns):
        # The first by itself: a gradient as large as the head is then not cleared to be added to. Without one, no
        # scan waits for it, and the logits of two chunks would be there at once.
        first, parts = (jax.tree.map(lambda a, part=part: a[part], parts) for part in (0, slice(1, None)))
        sums, dx = step(sums, first)
        if chunks > 1:
            sums, others = jax.lax.scan(step, sums, parts)
            dx = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), dx, others)
    else:
        sums, dx = jax.lax.scan(step, sums, parts)
    objective, nats, dw = sums
    if not differentiate:
        return (objective, nats), (x_ND, None)
    return (objective, nats), (dx.reshape(x_ND.shape), None if dw is None else dw.astype(w.dtype))


def _backward(head: Head, z_loss: float, grads: Any, cotangents: Any) -> tuple[Any, ...]:
    # Devices along tensor return equal shares of one sum, so the cotangent of all of them is theirs together.
    of_all = cotangents[0] * axis_size("tensor")
    return (*(None if g is None else (g * of_all).astype(g.dtype) for g in grads), None, None)


cross_entropy.defvjp(_by_chunk, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_nats(head: Head, x_ND: jax.Array, w: jax.Array, targets_N: jax.Array) -> jax.Array:
    """Return -log p of each target, f32[N], the same on all devices along `tensor`.

    A loss of them is ordinary JAX: its gradient by them weighs the tokens, and what is differentiated is then the fused
    sum of `cross_entropy` with these weights. The logits of `chunk` tokens exist at a time, and are computed twice.
    """
    chunks, row_V = loss_chunks(x_ND.shape[0], head.chunk), head.rows(w)

    @jax.named_scope(LOSS)
    def step(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x_nD, targets_n = part
        logits_nV = head.logits(x_nD, w)
        top_n = all_max(jnp.max(logits_nV, axis=-1), "tensor")
        z_n = jnp.sum(jnp.exp(logits_nV - top_n[:, None]), axis=-1)
        target_n = jnp.sum(jnp.where(row_V == targets_n[:, None], logits_nV, 0.0), axis=-1)
        z_n, target_n = all_reduce(jnp.stack([z_n, target_n]), "tensor")
        return None, top_n + jnp.log(z_n) - target_n

    parts = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), (x_ND, targets_N))
    return jax.lax.scan(step, None, parts)[1].reshape(-1)


def _nats_backward(head: Head, kept: tuple[jax.Array, ...], cotangent_N: jax.Array) -> tuple[Any, ...]:
    # Devices along tensor each have their share of the loss, and so of its gradient by the same tokens.
    weight_N = cotangent_N * axis_size("tensor")
    x_ND, w, targets_N = kept
    return (*_by_chunk(head, 0.0, x_ND, w, targets_N, weight_N)[1], None)


token_nats.defvjp(lambda head, *arrays: (token_nats(head, *arrays), arrays), _nats_backward)


def loss_chunks(tokens: int, chunk: int) -> int:
    """Into how many equal parts a device's tokens go for their loss, of `chunk` tokens at most."""
    return next(n for n in range(-(-tokens // chunk), tokens + 1) if tokens % n == 0)
