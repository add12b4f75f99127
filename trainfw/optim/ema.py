"""Exponential moving average of what learns, kept in the state of the optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainfw.optim.traits import Params


class Averaging(NamedTuple):
    """State of an optimizer, and the average of what it updates beside it."""

    inner: Any
    steps: jax.Array
    """Updates so far, an int32 scalar."""
    average: Params
    """Average of the parameters, in float32, sharded as the optimizer's other state is."""


def with_average(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """Return the same optimizer, which keeps an exponential moving average of the parameters beside its state.

    In the update n (from 0) the average decays by min(decay, (1 + n) / (10 + n)), and in the first by 0, as in
    Diffusers' `EMAModel` without `use_ema_warmup`, so that a short run is not held back by where it started.
    """
    run = optax.with_extra_args_support(optimizer).update

    def init(params: Params) -> Averaging:
        # A buffer of its own: parameters and average are both donated to a step.
        return Averaging(optimizer.init(params), jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates: Params, state: Averaging, params: Params = None, **extra: object) -> tuple[Params, Averaging]:
        updates, inner = run(updates, state.inner, params, **extra)
        # The share of the new parameters: 1 - 0.9999 by float32 would be off by 1 in 1,700.
        share = jnp.maximum(1.0 - decay, 9.0 / (10.0 + state.steps.astype(jnp.float32)))
        share = jnp.where(state.steps == 0, 1.0, share)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + share * (p - a), state.average, new)
        return updates, Averaging(inner, optax.safe_increment(state.steps), average)

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(opt_state: object) -> Params | None:
    """Return the average that an optimizer's state holds; None where it keeps none."""
    return opt_state.average if isinstance(opt_state, Averaging) else None
