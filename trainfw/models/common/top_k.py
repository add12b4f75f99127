"""The largest of many numbers where a chip has no `topk` and no `sort`: by maxima, comparisons and sums alone.

Zeros of both signs are equal here, which `jax.lax.top_k` puts in order, and so are subnormal numbers where a chip
takes them for zero. NaN is chosen last, which `jax.lax.top_k` puts first.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trainfw import backends

MOST_ROUNDS = 64
"""The largest k that is chosen one by one: each takes a pass over all numbers."""
_EXACT = 2**24
"""Counts and indices are float32, which holds every integer up to here."""
_LOWEST = float(jnp.finfo(jnp.float32).min)


def choose_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest along the last dim and where they are (i32), as `jax.lax.top_k` and as the device can.

    Where that is one by one, k is at most `MOST_ROUNDS`: see `top_k_problem`.
    """
    return jax.lax.top_k(x, k) if backends.current().top_k == "native" else iterative_top_k(x, k)


def top_k_problem(k: int, backend: backends.Backend) -> str | None:
    """Say why the k largest cannot be chosen on this backend, or None."""
    if backend.top_k == "native" or k <= MOST_ROUNDS:
        return None
    return f"{backend} has no topk, and takes a pass over all for each chosen; expected {MOST_ROUNDS} at most"


def iterative_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest along the last dim and where they are (i32): of equals the first, as `jax.lax.top_k` has them.

    Each round takes the maximum of what is left, and the least index that has it. (argmax is a reduction of pairs,
    which Neuron's documents refuse.) The values' gradient goes to the numbers chosen. Raises ValueError for a k that
    is not 0 to the size of the dim, or a dim that float32 cannot number, and TypeError for numbers that it cannot hold.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"the largest of {x.dtype}: expected float32, bfloat16 or float16")
    size = x.shape[-1]
    if not 0 <= k <= size or size > _EXACT:
        raise ValueError(f"k = {k} of {size:,}: expected 0 to {size:,}, of {_EXACT:,} at most")
    places = jnp.arange(size, dtype=jnp.float32)
    # Compared in float32, which holds bfloat16 and float16 exactly.
    fixed = jax.lax.stop_gradient(x).astype(jnp.float32)
    fixed = jnp.where(jnp.isnan(fixed), -jnp.inf, fixed)
    left = jnp.ones(x.shape, bool)
    values, indices = [], []
    for _ in range(k):
        largest = jnp.max(jnp.where(left, fixed, -jnp.inf), axis=-1, keepdims=True)
        index = jnp.min(jnp.where(left & (fixed == largest), places, jnp.inf), axis=-1, keepdims=True)
        chosen = places == index
        values.append(jnp.sum(jnp.where(chosen, x, jnp.zeros((), x.dtype)), axis=-1))
        indices.append(index[..., 0].astype(jnp.int32))
        left &= ~chosen
    if not k:
        return x[..., :0], jnp.zeros((*x.shape[:-1], 0), jnp.int32)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)


def likeliest(
    logits_V: jax.Array, top_k: int | jax.Array | None = None, top_p: float | jax.Array | None = None
) -> jax.Array:
    """Mark the tokens that a draw may take, bool[V]: the `top_k` likeliest, and of these the fewest that hold `top_p`.

    The tokens that sorting would find, of equals the first, with no sort: the least logit that is in is found bit by
    bit (32 comparisons with all, exact), and where some of its equals are in, so is the last of these. Sums of
    probabilities are float32: a token whose place is on the border of `top_p` within their rounding may fall on either
    side, as it does in a sum of sorted ones. Of arrays, i32[] and f32[], a `top_k` of 0 and a `top_p` of 1 take all.
    """
    size = logits_V.size
    if size > _EXACT:
        raise ValueError(f"a vocabulary of {size:,}: {_EXACT:,} at most")
    # The lowest number in place of -inf, whose neighbours in the order of bits are NaN.
    x_V = jnp.maximum(jnp.where(jnp.isnan(logits_V), _LOWEST, logits_V.astype(jnp.float32)), _LOWEST)
    in_V = jnp.ones(size, bool)
    if isinstance(top_k, jax.Array):
        in_V = (top_k <= 0) | _heaviest(x_V, jnp.ones(size), jnp.minimum(top_k, size).astype(jnp.float32))
    elif top_k is not None and top_k < size:
        in_V = _heaviest(x_V, jnp.ones(size), float(top_k))
    if top_p is not None:
        weights_V = jnp.where(in_V, jnp.exp(x_V - jnp.max(x_V)), 0.0)
        of_p_V = _heaviest(x_V, weights_V / jnp.sum(weights_V), top_p)
        in_V &= of_p_V | (top_p >= 1.0) if isinstance(top_p, jax.Array) else of_p_V
    return in_V


def _heaviest(x_V: jax.Array, weights_V: jax.Array, enough: float | jax.Array) -> jax.Array:
    """The first of all in falling order of x, and of the index among equals, whose weights come to `enough`."""

    def weight(chosen_V: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen_V, weights_V, 0.0))

    least = _number(_largest_bits(32, lambda bits: weight(x_V >= _number(bits)) >= enough))
    above_V, equal_V = x_V > least, x_V == least
    places_V = jnp.arange(x_V.size, dtype=jnp.float32)

    def through(bits: jax.Array) -> jax.Array:
        return above_V | (equal_V & (places_V < bits.astype(jnp.float32)))

    last = _largest_bits(24, lambda bits: weight(through(bits)) < enough).astype(jnp.float32)
    # All of them come to less, by rounding: all are in.
    return above_V | (equal_V & (places_V <= last)) | ~(weight(x_V >= _LOWEST) >= enough)


def _largest_bits(count: int, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest u32[] of `count` bits for which `holds`, which does for all below it; 0 for none."""

    bits = jnp.uint32(0)
    for number in reversed(range(count)):  # no loop, which not every chip has
        tried = bits | jnp.uint32(1 << number)
        bits = jnp.where(holds(tried), tried, bits)
    return bits


def _number(bits: jax.Array) -> jax.Array:
    """The f32[] at a place in the order of all: of floats above zero the bits rise with them, and below they fall."""
    top = jnp.uint32(1 << 31)
    return jax.lax.bitcast_convert_type(jnp.where(bits >= top, bits ^ top, ~bits), jnp.float32)
