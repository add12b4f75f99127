from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainfw.optim.adamw import largest_ratio, make_adamw, two_moments
from trainfw.optim.traits import Optimizer, Params, Traits

if TYPE_CHECKING:
    import optax

    from trainfw.optim.config import OptimizerConfig


def _make(config: OptimizerConfig, steps: int, decays: Callable[[Params], Params]) -> optax.GradientTransformation:
    import optax
    from optax.contrib import scale_by_muon

    from trainfw.optim.schedule import make_schedule

    matrices = optax.chain(
        _on_whole_matrices(scale_by_muon(beta=config.b1, weight_dimension_numbers=_stacked_matrices)),
        _match_adam_rms(),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    others = make_adamw(config, steps, decays, config.adam_learning_rate)
    return optax.partition({"matrix": matrices, "other": others}, _labels)


def _labels(params: Params) -> Params:
    import jax

    return jax.tree_util.tree_map_with_path(
        lambda path, _: "matrix" if path[0].key == "layers" and path[-1].key == "kernel" else "other", params
    )


def _stacked_matrices(params: Params) -> Params:
    """The layers' matrices are stacked along a leading dim, which Muon is to treat as a batch."""
    import jax
    from optax.contrib import MuonDimensionNumbers

    return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)


def _on_whole_matrices(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Orthogonalise whole matrices, the layers dealt out among devices."""
    import optax

    from trainfw.parallel import by_layer

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        return by_layer(muon.update, updates, state)

    return optax.GradientTransformation(muon.init, update)


def _match_adam_rms() -> optax.GradientTransformation:
    """Give Muon's orthogonal updates the root mean square of AdamW's typical ones, 0.2, whatever the shape.

    So that one learning rate serves both (Liu et al. 2025, https://arxiv.org/abs/2502.16982, equation 4).
    """
    import jax
    import optax

    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates))


def _state_bytes(name: str, shape: tuple[int, ...], parts: int) -> int:
    return 4 * math.prod(shape) // parts if name == "layers.kernel" else two_moments(name, shape, parts)


MUON = Optimizer(
    _make,
    Traits(
        kernels_alone=True,
        fields=("adam_learning_rate",),
        # Less than a root mean square of 1, of which no element exceeds the root of their number; or AdamW's.
        largest_update=lambda config, step, size: max(largest_ratio(config, step, size), math.sqrt(size)),
        state_bytes=_state_bytes,
    ),
)
