from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainfw.optim.traits import Decays, Optimizer, Rate, Traits

if TYPE_CHECKING:
    import optax

    from trainfw.optim.config import OptimizerConfig


def _make(config: OptimizerConfig, rate: Rate, decays: Decays) -> optax.GradientTransformation:
    import optax

    return optax.lion(rate(), config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)


LION = Optimizer(
    _make,
    Traits(
        whole_matrices=False,
        may_overflow=False,
        largest_update=lambda config, step, size: 1.0,  # it moves by signs
        state_bytes=lambda name, shape, parts: 4 * math.prod(shape) // parts,
    ),
)
