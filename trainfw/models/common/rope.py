"""Rotary position embeddings, in the half-rotation layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from trainfw.models.decoder.config import LayerKind, ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, kind: LayerKind) -> jax.Array:
    """Radians per position of each pair, f32[h / 2], in layers of this kind."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    if kind == "sliding" and config.rope_local_theta is not None:
        return config.rope_local_theta**-exponents
    frequencies = config.rope_theta**-exponents
    return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1 (github.com/meta-llama/llama-models, apply_scaling): by how often a pair turns in the original length.
    original, low, high = scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor
    assert original is not None and low is not None and high is not None  # noqa: PT018
    turns = original * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope_turns(positions_BS: jax.Array, config: ModelConfig, kind: LayerKind) -> tuple[jax.Array, jax.Array]:
    """The cosine and sine of every pair's angle at every position: f32[B, S, h / 2] each."""
    angles = positions_BS.astype(jnp.float32)[..., None] * rope_frequencies(config, kind)
    # Once: XLA would compute them again for every head of every layer that they are fused into.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def apply_rope(x_BSHh: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + h / 2) of every head, in f32; the result has the dtype of `x_BSHh`."""
    cos, sin = (t[:, :, None, :] for t in turns)
    first, second = jnp.split(x_BSHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSHh.dtype)
