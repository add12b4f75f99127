from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import optax

    from trainfw.optim.config import OptimizerConfig

Params: TypeAlias = Any
"""A nested dict of arrays; a parameter's name is its keys joined by dots."""
Decays: TypeAlias = Callable[[Params], Params]
"""Function that tells which parameters decay."""
Rate: TypeAlias = "Callable[..., optax.Schedule]"
"""Function from a peak, by default the recipe's, to the learning rate by step."""


@dataclass(frozen=True)
class Traits:
    """Facts that the rest of trainfw must know of an optimizer. The defaults are the safe ones: true of every one."""

    whole_matrices: bool = True
    """An update reads whole matrices, so its work on a core does not shrink with the number of cores."""
    kernels_alone: bool = False
    """True where it updates the kernels of layers, of which an adapter trains none."""
    may_overflow: bool = True
    """Finite gradients may give updates that are not finite."""
    scales: bool = False
    """It can multiply its updates by factors that muP says (`FamilyConfig.update_scales`)."""
    fields: tuple[str, ...] = ()
    """Keys of `optimizer` that it alone reads."""
    largest_update: Callable[[OptimizerConfig, int, int], float] = lambda config, step, size: math.inf
    """(config, step, size of the array) -> by how much an element can change at most in that step, per unit of learning
    rate and without its decay."""
    state_bytes: Callable[[str, tuple[int, ...], int], int] | None = None
    """(name, shape, parts that it is cut into) -> bytes of state on one core, counters left out. None: looked up in the
    shapes of the state."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of ours: its update, and its traits."""

    make: Callable[..., optax.GradientTransformation]
    """Function of (config, rate, decays) that returns the update, without clipping; where its traits say `scales`, also
    of `scaled`, a function that multiplies updates."""
    traits: Traits


class OwnOptimizer(Protocol):
    """An optimizer of somebody's own: a function of the learning rate. It may have an attribute `traits`."""

    def __call__(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """Return the whole update but clipping, with a learning rate by step: the recipe's schedule."""
