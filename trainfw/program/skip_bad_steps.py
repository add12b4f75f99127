"""Judgement of bad steps, made on the devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_WINDOW = 50.0
"""Steps over which the running mean and variance are, roughly."""
_SETTLED = 20.0
"""Good steps before any can be a spike."""

Guard = dict[str, jax.Array]
"""`count` f32[], `mean` and `variance` f32[2], of the loss and the gradient's norm of good steps."""


def start_guard() -> Guard:
    return {"count": jnp.float32(0), "mean": jnp.zeros(2), "variance": jnp.zeros(2)}


def judge(guard: Guard, values: jax.Array, sigma: float) -> tuple[jax.Array, Guard]:
    """(whether `values`, f32[2], are `sigma` standard deviations above what they were, what they are from now on).

    The mean and variance are exponentially weighted (West, "Updating mean and variance estimates", 1979), and plain
    ones for the first steps. A spike, or what is not finite, does not count in them.
    """
    settled = guard["count"] >= _SETTLED
    above = values > guard["mean"] + sigma * jnp.sqrt(guard["variance"])
    spike = settled & jnp.any(above)
    count = guard["count"] + 1
    weight = jnp.maximum(1 / count, 1 / _WINDOW)
    difference = values - guard["mean"]
    new = {
        "count": count,
        "mean": guard["mean"] + weight * difference,
        "variance": (1 - weight) * (guard["variance"] + weight * difference**2),
    }
    return spike, keep_where(spike | ~jnp.all(jnp.isfinite(values)), guard, new)


def keep_where(bad: jax.Array, old: Any, new: Any) -> Any:
    """`old` where the step is bad. Integers (the counts of steps in an optimizer's state) go on all the same, so that
    the schedule ends with the run."""
    return jax.tree.map(lambda o, n: jnp.where(bad, o, n) if jnp.issubdtype(n.dtype, jnp.floating) else n, old, new)
