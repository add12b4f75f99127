from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainfw.optim.traits import Decays, Optimizer, Params, Rate, Traits

if TYPE_CHECKING:
    import optax

    from trainfw.optim.config import OptimizerConfig


def make_adamw(
    config: OptimizerConfig,
    rate: Rate,
    decays: Decays,
    peak: float | None = None,
    scaled: Callable[[Params], Params] | None = None,
) -> optax.GradientTransformation:
    """Return AdamW, at the recipe's learning rate or at another `peak`.

    Args:
        scaled: multiplies updates, before decay is added: muP's learning rates, at which weights decay as they do at
            the base width, as in Microsoft's `mup.MuAdamW`.
    """
    import optax

    moments = (config.b1, config.b2, config.epsilon)
    if scaled is None:
        return optax.adamw(rate(peak), *moments, weight_decay=config.weight_decay, mask=decays)
    return optax.chain(
        optax.scale_by_adam(*moments),
        optax.stateless(lambda updates, _: scaled(updates)),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(rate(peak)),
    )


def largest_ratio(config: OptimizerConfig, step: int, size: int) -> float:
    """Return the largest mean over root of the mean square, of all histories of gradients (by Cauchy and Schwarz)."""
    return max(_ratio(config.b1, config.b2, n) for n in {*range(1, min(step, 1000) + 1), step})


def _ratio(b1: float, b2: float, step: int) -> float:
    """sqrt(sum of w**2 / v) for the weights w and v that the moments give the gradients of `step` steps."""
    if b2 == 0:
        return math.inf if b1 and step > 1 else 1.0
    ratio = b1 * b1 / b2
    try:
        total = step if ratio == 1 else (1 - ratio**step) / (1 - ratio)
        return math.sqrt(total * (1 - b2**step) / (1 - b2)) * (1 - b1) / (1 - b1**step)
    except OverflowError:
        return math.inf


def two_moments(name: str, shape: tuple[int, ...], parts: int) -> int:
    """Return the bytes of two moments in float32."""
    return 8 * math.prod(shape) // parts


ADAMW = Optimizer(
    make_adamw,
    Traits(
        whole_matrices=False,
        may_overflow=False,
        scales=True,
        largest_update=largest_ratio,
        state_bytes=two_moments,
    ),
)
