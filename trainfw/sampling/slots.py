"""The draw of a token for every row of a serving batch, each by settings of its own, which are arrays."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from trainfw import backends
from trainfw.models import choose_top_k, likeliest

ALTERNATIVES = 8
"""The likeliest tokens that are told of a step that filters."""


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
    top_k_B: jax.Array | None = None
    """0: all, i32. None, with the next two: nothing filters the tokens of any row."""
    top_p_B: jax.Array | None = None
    """1: all, f32."""
    allowed_BW: jax.Array | None = None
    """Tokens that may be drawn, u32[B, ceil(V / 32)]: bit i % 32 of word i // 32 is token i's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DrawnTokens:
    """Tokens drawn, and natural logarithms of probabilities as the model has them, before any setting."""

    token_B: jax.Array
    logprob_B: jax.Array
    likeliest_BN: jax.Array | None = None
    """The `ALTERNATIVES` likeliest tokens of each row, i32, likeliest first; None where nothing filters."""
    likeliest_logprob_BN: jax.Array | None = None


def draw_tokens(logits_BV: jax.Array, draws: Draws) -> DrawnTokens:
    """Draw a token for each row of logits, f32[B, V]: allowed, then among `top_k`, then `top_p`, by temperature."""
    B, V = logits_BV.shape
    log_total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    first, first_BN = None, None
    chosen_BV = logits_BV
    scale_B1 = jnp.where(draws.temperature_B > 0, draws.temperature_B, 1.0)[:, None]
    if draws.allowed_BW is not None:
        assert draws.top_k_B is not None and draws.top_p_B is not None  # noqa: PT018
        values_BN, first_BN = choose_top_k(logits_BV, min(ALTERNATIVES, V))
        first = values_BN - log_total_B1
        bits = (draws.allowed_BW[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
        chosen_BV = jnp.where(bits.reshape(B, -1)[:, :V] == 1, chosen_BV, -jnp.inf)
        in_BV = jax.vmap(likeliest)(chosen_BV / scale_B1, draws.top_k_B, draws.top_p_B)
        chosen_BV = jnp.where(in_BV, chosen_BV, -jnp.inf)
    warm_BV = chosen_BV / scale_B1 + _gumbel(draws, V)
    token_B = _largest(jnp.where((draws.temperature_B > 0)[:, None], warm_BV, chosen_BV))
    is_token_BV = jnp.arange(V, dtype=jnp.int32) == token_B[:, None]
    logit_B = jnp.sum(jnp.where(is_token_BV, logits_BV, 0.0), axis=-1)
    return DrawnTokens(token_B, logit_B - log_total_B1[:, 0], first_BN, first)


def _largest(x_BV: jax.Array) -> jax.Array:
    if backends.current().top_k == "native":
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)
    return choose_top_k(x_BV, 1)[1][:, 0]


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
