"""A look at the first step's numbers, where donation is not sure to be right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from trainfw import backends
from trainfw.errors import RunError
from trainfw.objectives import Metrics
from trainfw.optim import Traits, average_of, traits_of
from trainfw.program import TrainState
from trainfw.recipe import Recipe

_MOST = 4096
"""Numbers of an array that are compared, spread over it."""
_NEAR = {"float32": 1e-3, "bfloat16": 0.02, "fp8": 0.05}
"""Largest relative difference between two programs' losses, by the dtype that they compute in."""
_SLACK = 1.01
"""Factor on the largest update, for rounding."""


class FirstStep:
    """The state before a session's first step, as far as it is needed to judge the state after.

    Donation that goes wrong gives buffers that are written before they are read, or hold another array's numbers. To
    compute the step twice would take a second compilation and twice the memory. So what must hold of a right step is
    looked at: the loss is that of validation's program, compiled anyway, on the same batch; the step is counted, and
    what does not learn is what it was; parameters are finite, some have moved, and none by more than the optimizer
    can; an average of them (`optimizer.ema`) lies between what it was and what they are. Of each array it sees up to
    4,096 numbers of this process's first part, and of the optimizer's moments none: wrong ones show in a later update
    only, by faults of the loss.

    Args:
        loss: of the batch, by the evaluation step; None where there is none, or it is not to be compared.
        traits: of the optimizer; None: by the recipe's name of it.
    """

    def __init__(self, recipe: Recipe, state: TrainState, loss: float | None, traits: Traits | None = None):
        train = recipe.train
        self.traits = traits_of(recipe.optimizer) if traits is None else traits
        self.optimizer, self.loss = recipe.optimizer, loss
        self.near = _NEAR[train.matmul_dtype if train.matmul_dtype in _NEAR else train.compute_dtype]
        self.step = int(_numbers(state.step)[0])
        self.params, self.kept = _samples(state.params), _kept(state)
        self.average = _samples(average_of(state.opt_state))

    def problem(self, state: TrainState, metrics: Metrics) -> str | None:
        """Say what cannot be of the state after the step; None for nothing. Of a bad step, nothing is said."""
        loss, norm = metrics["loss"].value(), metrics["grad_norm"].value()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None  # `faults` has a policy for it
        if self.loss is not None and not abs(loss - self.loss) <= self.near * max(abs(self.loss), 1.0):
            return f"its loss is {loss:.6g}, and the evaluation step's of the same batch {self.loss:.6g}"
        if (step := int(_numbers(state.step)[0])) != self.step + 1:
            return f"it counts as step {step}, after {self.step}"
        for name, after in _kept(state).items():
            if after.tobytes() != self.kept[name].tobytes():
                return f"{name} has changed, which does not learn"
        params = _samples(state.params)
        sizes = {name: leaf.size for name, leaf in _leaves(state.params)}
        return self._moved(params, sizes, metrics) or self._averaged(state, params)

    def _moved(self, after: dict[str, np.ndarray], sizes: dict[str, int], metrics: Metrics) -> str | None:
        config, moved = self.optimizer, False
        # The largest of any parameter.
        rate = metrics["learning_rate"].value() * max(1.0, (config.adam_learning_rate or 0.0) / config.learning_rate)
        for name, before in self.params.items():
            if not np.all(np.isfinite(after[name])):
                return f"{name} is not finite, though its loss is"
            change = np.abs(after[name] - before)
            decay = rate * config.weight_decay * np.abs(before)
            most = _SLACK * (rate * self.traits.largest_update(config, self.step + 1, sizes[name]) + decay)
            over = change > most + 1e-6 * np.abs(before)  # of the sum in float32
            if np.any(over):
                return f"{name} has moved by {np.max(change[over]):.3g}, more than an update can ({np.min(most):.3g})"
            moved |= bool(np.any(change))
        skipped = "spike" in metrics and metrics["spike"].value()
        if not moved and not skipped and metrics["grad_norm"].value() > 0 and rate >= 1e-6:
            return "no parameter has changed"
        return None

    def _averaged(self, state: TrainState, params: dict[str, np.ndarray]) -> str | None:
        average, learnt = average_of(state.opt_state), dict(_leaves(state.params))
        for name, leaf in _leaves(average):
            after, before, new = _numbers(leaf), self.average[name], params[name]
            if not np.all(np.isfinite(after)):
                return f"the average of {name} is not finite"
            if leaf.sharding != learnt[name].sharding:
                continue  # parameters are whole where the average is not: the numbers are of other places
            slack = 1e-6 * np.maximum(np.abs(before), np.abs(new))
            if np.any((after < np.minimum(before, new) - slack) | (after > np.maximum(before, new) + slack)):
                return f"the average of {name} is not between what it was and what {name} is"
        return None


def check_first_step(first: FirstStep, state: TrainState, metrics: Metrics, name: str) -> None:
    """Raise RunError, in every process, where any finds a problem. `name` is this check's own."""
    if problem := next(filter(None, backends.exchange(name, first.problem(state, metrics))), None):
        raise RunError(
            f"the first step cannot be right: {problem}; nothing of it was saved. The state was donated to it: try "
            "backend.donate=false, which takes memory for the state twice"
        )


def _kept(state: TrainState) -> dict[str, np.ndarray]:
    return _samples({"frozen": state.frozen, "rng": state.rng})


def _samples(tree: Any) -> dict[str, np.ndarray]:
    return {name: _numbers(leaf) for name, leaf in _leaves(tree)}


def _leaves(tree: Any) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _numbers(array: jax.Array) -> np.ndarray:
    """Up to `_MOST` numbers of this process's first part, through a copy: the array stays free to be donated."""
    copy = jax.device_put(array.addressable_shards[0].data, backends.host_device(), may_alias=False)
    flat = np.asarray(copy).reshape(-1)
    return flat[:: max(1, -(-flat.size // _MOST))].copy()
