from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainfw.optim.adafactor import ADAFACTOR
from trainfw.optim.adamw import ADAMW
from trainfw.optim.lion import LION
from trainfw.optim.muon import MUON
from trainfw.optim.traits import Optimizer, OwnOptimizer, Traits
from trainfw.pieces import is_own, load_piece

if TYPE_CHECKING:
    from trainfw.optim.config import OptimizerConfig

OPTIMIZERS: dict[str, Optimizer] = {"adamw": ADAMW, "lion": LION, "adafactor": ADAFACTOR, "muon": MUON}


NO_SCALES = (
    "muP's learning rates (model.mup) are implemented for adamw alone: set optimizer.name to it, or mup to false"
)


def scales_updates(name: str) -> bool:
    """Tell whether an optimizer of ours can multiply its updates by muP's factors."""
    return name in OPTIMIZERS and OPTIMIZERS[name].traits.scales


def traits_of(config: OptimizerConfig, own: OwnOptimizer | None = None) -> Traits:
    """Return the traits of a recipe's optimizer, or of the one that a script hands over in its place."""
    if own is None and not is_own(config.name):
        return OPTIMIZERS[config.name].traits
    return getattr(load_piece(config.name) if own is None else own, "traits", None) or Traits()


def state_bytes(config: OptimizerConfig, name: str, shape: tuple[int, ...], parts: int) -> int:
    """Return the bytes of state on one core, counters left out, of a parameter that is cut into `parts`."""
    if (known := traits_of(config).state_bytes) is not None:
        return known(name, shape, parts) + (0 if config.ema is None else 4 * math.prod(shape) // parts)
    import jax

    from trainfw.optim.optimizer import make_optimizer

    # Of the state's shapes, what has the parameter's own is cut as it is, and the rest is whole.
    params: Any = jax.ShapeDtypeStruct(shape, "float32")
    for key in reversed(name.split(".")):
        params = {key: params}
    leaves = jax.tree.leaves(jax.eval_shape(make_optimizer(config, config.warmup_steps + 1).init, params))
    return sum(x.size * x.dtype.itemsize // (parts if x.shape == shape else 1) for x in leaves if x.shape)
