from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainfw.optim.traits import Decays, Optimizer, Rate, Traits

if TYPE_CHECKING:
    import optax

    from trainfw.optim.config import OptimizerConfig


def _make(config: OptimizerConfig, rate: Rate, decays: Decays) -> optax.GradientTransformation:
    import optax

    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(rate()),
    )


def _state_bytes(name: str, shape: tuple[int, ...], parts: int) -> int:
    elements = math.prod(shape)
    *_, second, first = sorted((1, *shape))
    if len(shape) > 1 and second >= 128:  # a row and a column, on every core
        return 4 * (elements // first + elements // second + 1)
    return 4 * (elements // parts + 2)


ADAFACTOR = Optimizer(
    _make,
    Traits(
        whole_matrices=False,
        may_overflow=False,
        # Its updates have a root mean square of 1 at most: no element exceeds the root of their number.
        largest_update=lambda config, step, size: math.sqrt(size),
        state_bytes=_state_bytes,
    ),
)
