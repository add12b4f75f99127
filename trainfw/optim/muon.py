from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainfw.optim.adamw import largest_ratio, make_adamw, two_moments
from trainfw.optim.traits import Decays, Optimizer, Params, Rate, Traits

if TYPE_CHECKING:
    import optax

    from trainfw.optim.config import OptimizerConfig


def _make(config: OptimizerConfig, rate: Rate, decays: Decays) -> optax.GradientTransformation:
    import jax
    import optax
    from optax.contrib import MuonDimensionNumbers, scale_by_muon

    from trainfw.parallel import by_layer

    # The layers' matrices are stacked along a leading dim, which Muon is to treat as a batch.
    muon = scale_by_muon(
        beta=config.b1,
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params),
    )

    def orthogonalise(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """Orthogonalise whole matrices, the layers dealt out among devices."""
        return by_layer(muon.update, updates, state)

    def match_adam(updates: Params, params: Params | None = None) -> Params:
        """Give Muon's orthogonal updates the root mean square of AdamW's typical ones, 0.2, whatever the shape.

        So that one learning rate serves both (Liu et al. 2025, https://arxiv.org/abs/2502.16982, equation 4).
        """
        return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates)

    def labels(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if path[0].key == "layers" and path[-1].key == "kernel" else "other", params
        )

    matrices = optax.chain(
        optax.GradientTransformation(muon.init, orthogonalise),
        optax.stateless(match_adam),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(rate()),
    )
    others = make_adamw(config, rate, decays, config.adam_learning_rate)
    return optax.partition({"matrix": matrices, "other": others}, labels)


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
