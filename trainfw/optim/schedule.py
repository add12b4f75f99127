from __future__ import annotations

import optax

from trainfw.errors import UserError
from trainfw.optim.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate by step, for a run of `steps` steps: linear warmup, then the configured shape.

    Step 0's update already learns: warmup runs from peak / (warmup_steps + 1), not from 0.
    """
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
