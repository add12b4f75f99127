"""The draw of a token for every row of a serving batch, each by settings of its own, which are arrays."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from trainfw.models import choose_top_k, iterative_top_k, likeliest

ALTERNATIVES = 8
"""The likeliest tokens of which a draw tells."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """Settings of each row's draw."""

    temperature_B: jax.Array
    """0 takes the likeliest token, f32."""
    seed_B: jax.Array
    """u32."""
    count_B: jax.Array
    """Tokens drawn for this answer before, i32: with the seed it decides the draw, whatever shares the batch."""
    top_k_B: jax.Array
    """0: all, i32."""
    top_p_B: jax.Array
    """1: all, f32."""
    allowed_BW: jax.Array
    """Tokens that may be drawn, u32[B, ceil(V / 32)]: bit i % 32 of word i // 32 is token i's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DrawnTokens:
    """Tokens drawn, and natural logarithms of probabilities as the model has them, before any setting."""

    token_B: jax.Array
    logprob_B: jax.Array
    likeliest_BN: jax.Array | None = None
    """The `ALTERNATIVES` likeliest tokens of each row, i32, likeliest first; None where all take the likeliest."""
    likeliest_logprob_BN: jax.Array | None = None


def draw_tokens(logits_BV: jax.Array, draws: Draws | None) -> DrawnTokens:
    """Draw a token for each row of logits, f32[B, V]: allowed, then among `top_k`, then `top_p`, by temperature.

    Without `draws` it is the likeliest of every row.
    """
    B, V = logits_BV.shape
    log_total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    if draws is None:
        token_B = _largest(logits_BV)
        return DrawnTokens(token_B, _of_token(logits_BV, token_B) - log_total_B1[:, 0])
    values_BN, first_BN = choose_top_k(logits_BV, min(ALTERNATIVES, V))
    bits = (draws.allowed_BW[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    allowed_BV = jnp.where(bits.reshape(B, -1)[:, :V] == 1, logits_BV, -jnp.inf)
    scaled_BV = allowed_BV / jnp.where(draws.temperature_B > 0, draws.temperature_B, 1.0)[:, None]
    in_BV = jax.vmap(likeliest)(scaled_BV, draws.top_k_B, draws.top_p_B)
    warm_BV = jnp.where(in_BV, scaled_BV, -jnp.inf) + _gumbel(draws, V)
    token_B = _largest(jnp.where((draws.temperature_B > 0)[:, None], warm_BV, allowed_BV))
    logprob_B = _of_token(logits_BV, token_B) - log_total_B1[:, 0]
    return DrawnTokens(token_B, logprob_B, first_BN, values_BN - log_total_B1)


def _of_token(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    places_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    return jnp.sum(jnp.where(places_V == token_B[:, None], logits_BV, 0.0), axis=-1)


def _largest(x_BV: jax.Array) -> jax.Array:
    """Return the first index of each row's largest, i32[B], without argmax: a reduction of pairs, which XLA's CPU
    backend does number by number, and Neuron's compiler not at all."""
    return iterative_top_k(x_BV, 1)[1][:, 0]


def _gumbel(draws: Draws, V: int) -> jax.Array:
    """Return noise whose sum with logits is largest for a token drawn from their softmax, f32[B, V].

    By the `rbg` generator: Neuron's compiler refuses Threefry. One row at a time, for it draws the same for every key
    of a batch.
    """
    rows = []
    for b in range(draws.seed_B.shape[0]):
        state = jnp.stack([draws.seed_B[b], jnp.uint32(0), draws.count_B[b].astype(jnp.uint32), jnp.uint32(0)])
        rows.append(jax.random.bits(jax.random.wrap_key_data(state, impl="rbg"), (V,), jnp.uint32))
    uniform_BV = ((jnp.stack(rows) >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform_BV))
