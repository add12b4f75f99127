from __future__ import annotations

from collections.abc import Sequence

import optax

from trainfw.errors import UserError
from trainfw.optim.config import OptimizerConfig

Rates = Sequence[tuple[int, int, OptimizerConfig]]
"""(first step, end, config) of parts of a run, in order, whose learning rate is a schedule of their own."""


def make_schedule(config: OptimizerConfig, steps: int, peak: float | None = None, rates: Rates = ()) -> optax.Schedule:
    """Learning rate by step, for a run of `steps` steps: linear warmup, then the configured shape.

    Step 0's update already learns: warmup runs from peak / (warmup_steps + 1), not from 0.

    Args:
        peak: in the place of the config's.
        rates: parts of the run that have others.
    """
    if rates:
        return _in_parts(config, steps, peak, rates)
    peak = config.learning_rate if peak is None else peak
    final = peak * config.final_fraction
    rest = max(steps - config.warmup_steps, 1)
    decay = config.decay_steps or min(max(steps // 10, 1), rest)
    if decay > rest:
        raise UserError(f"decay_steps = {decay} is longer than the {rest} steps after warmup")
    after: optax.Schedule
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "wsd":
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _in_parts(config: OptimizerConfig, steps: int, peak: float | None, rates: Rates) -> optax.Schedule:
    whole = make_schedule(config, steps, peak)
    schedules, ends, at = [], [], 0

    def rest(first: int) -> optax.Schedule:
        return lambda step: whole(step + first)

    for first, end, own in rates:
        if first > at:
            schedules.append(rest(at))
            ends.append(first)
        schedules.append(make_schedule(own, end - first, None if peak is None else own.adam_learning_rate))
        ends.append(end)
        at = end
    return optax.join_schedules([*schedules, rest(at)], ends)
