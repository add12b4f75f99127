"""Update of all devices together: the optimizer's step on the gradients, and leaving a bad one out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainfw.objectives import Batch, Mean, Metrics
from trainfw.optim import Traits
from trainfw.parallel import Rules, use_rules
from trainfw.program.skip_bad_steps import judge, keep_where
from trainfw.program.state import TrainState
from trainfw.recipe import Recipe


@dataclass(frozen=True)
class Update:
    """A training step over the gradients of all devices."""

    recipe: Recipe
    rules: Rules
    optimizer: optax.GradientTransformationExtraArgs
    traits: Traits
    schedule: Callable[[jax.Array], Any]
    shardings: Any
    """Nested dict: how the optimizer's state of each parameter is kept, and so each one's update."""
    gradient_sums: Callable[..., tuple[Any, Metrics]]
    """(params, wholes, frozen, batch, key) -> (gradients of the summed loss, metrics)."""
    wholes: bool
    """Parameters are whole on every device, and their gradients are not."""
    draws: bool
    """The loss draws at random, from the state's key."""

    def gradients(self, params: Any, frozen: Any, batch: Batch, key: jax.Array | None = None) -> tuple[Any, Metrics]:
        """Return the gradients of the mean loss, and the metrics."""
        sums, metrics = self.gradient_sums(params, params if self.wholes else None, frozen, batch, key)
        # Summed over all that is counted and divided once, so that how a batch is split never weighs its parts.
        # By its inverse: compilers do a product again wherever it is read, and write a quotient down.
        share = 1.0 / jnp.maximum(metrics["loss"].count, 1.0)
        metrics["grad_norm"] = Mean(optax.global_norm(sums) * share, 1.0)  # of what is in memory
        return jax.tree.map(lambda g: g * share, sums), metrics

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and the metrics."""
        own = state.rng[0] ^ state.step.astype(jnp.uint32)
        key = jnp.stack([own, state.rng[1], state.rng[2], jnp.uint32(0)]) if self.draws else None
        grads, metrics = self.gradients(state.params, state.frozen, batch, key)
        # A device updates the share of which it keeps the optimizer's state, and only then is it gathered again.
        params = jax.lax.with_sharding_constraint(state.params, self.shardings)
        with use_rules(self.rules), self.recipe.blamed("optimizer"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, params, norm=metrics["grad_norm"].total)
        if self.traits.may_overflow:  # a norm is a pass over the updates
            metrics["update_norm"] = Mean(optax.global_norm(updates), 1.0)
        metrics["learning_rate"] = Mean(jnp.float32(self.schedule(state.step)), 1.0)
        updated = jax.lax.with_sharding_constraint(optax.apply_updates(params, updates), self.shardings)
        guard = state.guard
        faults = self.recipe.faults
        if faults.non_finite == "skip" or faults.spike_sigma is not None:
            bad, guard = self._judged(metrics, guard)
            updated = keep_where(bad, params, updated)
            opt_state = keep_where(bad, state.opt_state, opt_state)
        return TrainState(state.step + 1, updated, opt_state, state.rng, state.frozen, guard), metrics

    def _judged(self, metrics: Metrics, guard: Any) -> tuple[jax.Array, Any]:
        values = jnp.stack([metrics["loss"].total / metrics["loss"].count, metrics["grad_norm"].total])
        bad = ~jnp.all(jnp.isfinite(values))
        if "update_norm" in metrics:
            bad |= ~jnp.isfinite(metrics["update_norm"].total)
        if self.recipe.faults.spike_sigma is not None:
            spike, guard = judge(guard, values, self.recipe.faults.spike_sigma)
            metrics["spike"] = Mean(spike.astype(jnp.float32), 1.0)
            bad |= spike
        return bad, guard
