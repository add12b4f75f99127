from __future__ import annotations

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from trainfw.errors import UserError
from trainfw.optim.config import OptimizerConfig
from trainfw.optim.schedule import make_schedule
from trainfw.parallel import by_layer

Params = Any
"""A nested dict of arrays; a parameter's name is its keys joined by dots."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping, the optimizer, decoupled weight decay and the schedule, as one Optax transformation.

    `update` takes the gradients' global norm as `norm`; left out, clipping computes it.
    """
    schedule = make_schedule(config, steps)

    def decays(params: Params) -> Params:
        return _decay_mask(params, config.weight_decay_exclude)

    optimizer: optax.GradientTransformation
    match config.name:
        case "adamw":
            optimizer = optax.adamw(
                schedule, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decays
            )
        case "lion":
            optimizer = optax.lion(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)
        case "adafactor":
            optimizer = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(config.weight_decay, mask=decays),
                optax.scale_by_learning_rate(schedule),
            )
        case "muon":
            adam_schedule = make_schedule(config, steps, config.adam_learning_rate)
            optimizer = optax.partition(
                {
                    "matrix": optax.chain(
                        _on_whole_matrices(scale_by_muon(beta=config.b1, weight_dimension_numbers=_stacked_matrices)),
                        _match_adam_rms(),
                        optax.add_decayed_weights(config.weight_decay, mask=decays),
                        optax.scale_by_learning_rate(schedule),
                    ),
                    "other": optax.adamw(
                        adam_schedule,
                        config.b1,
                        config.b2,
                        config.epsilon,
                        weight_decay=config.weight_decay,
                        mask=decays,
                    ),
                },
                _muon_labels,
            )
    if config.clip_norm is not None:
        optimizer = optax.chain(_clip_by_global_norm(config.clip_norm), optimizer)

    def init(params: Params) -> Any:
        _check_patterns(params, config.weight_decay_exclude)
        return optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(optimizer).update)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, for whoever has the norm at hand (`norm=` of `update`), and as one factor.

    Compilers do a product again in each moment that reads it. Optax divides by the norm, and quotients they write down.
    """

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.global_norm(updates) if norm is None else norm
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Params, shardings: Params, replicated: NamedSharding
) -> Any:
    """The sharding of every array of the optimizer's state, given abstract `params` and their shardings.

    A moment of a parameter's own shape is sharded as the parameter. Scalars, and Adafactor's factored moments
    (a row or a column of a matrix), are replicated.
    """
    of_param = {
        _keys(path): (param.shape, sharding)
        for (path, param), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # A moment sits in the state under the keys of its parameter, behind the optimizer's own.
        keys = _keys(path)
        for start in range(len(keys)):
            shape, sharding = of_param.get(keys[start:], (None, replicated))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(optimizer.init, params))


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", key)) for key in path)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)


def _decay_mask(params: Params, exclude: list[str]) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(fnmatch.fnmatch(_name(path), pattern) for pattern in exclude), params
    )


def _check_patterns(params: Params, exclude: list[str]) -> None:
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in exclude:
        # The defaults suit every model: one without biases is no mistake.
        if pattern not in OptimizerConfig().weight_decay_exclude and not fnmatch.filter(names, pattern):
            raise UserError(f"weight_decay_exclude: {pattern!r} matches none of the parameters {', '.join(names)}")


def _muon_labels(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "matrix" if path[0].key == "layers" and path[-1].key == "kernel" else "other", params
    )


def _stacked_matrices(params: Params) -> Params:
    """The layers' matrices are stacked along a leading dim, which Muon is to treat as a batch."""
    return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)


def _on_whole_matrices(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Orthogonalise whole matrices, the layers dealt out among devices."""

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        return by_layer(muon.update, updates, state)

    return optax.GradientTransformation(muon.init, update)


def _match_adam_rms() -> optax.GradientTransformation:
    """Give Muon's orthogonal updates the root mean square of AdamW's typical ones, 0.2, whatever the shape.

    So that one learning rate serves both (Liu et al. 2025, https://arxiv.org/abs/2502.16982, equation 4).
    """
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates))
