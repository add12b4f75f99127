from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from trainfw.errors import UserError, short
from trainfw.optim.config import OptimizerConfig
from trainfw.optim.ema import with_average
from trainfw.optim.registry import NO_SCALES, OPTIMIZERS, scales_updates
from trainfw.optim.schedule import Rates, make_schedule
from trainfw.optim.traits import OwnOptimizer, Params
from trainfw.pieces import is_own, make_piece, running

_name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    own: OwnOptimizer | None = None,
    rates: Rates = (),
    scales: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, the optimizer, decoupled weight decay, the schedule and the average, as one Optax transformation.

    `own` is one that a script hands over in the place of the recipe's; `rates` are as in `make_schedule`, and `scales`
    factors on updates, by patterns of parameters' names. `update` takes the gradients' global norm as `norm`; left out,
    clipping computes it.

    Raises UserError for an optimizer that has no rule for `scales`.
    """
    if scales is not None and (own is not None or not scales_updates(config.name)):
        raise UserError(f"name = {config.name!r}: {NO_SCALES}")

    exclude = config.weight_decay_exclude

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(fnmatch.fnmatch(_name(path), pattern) for pattern in exclude), params
        )

    rate = functools.partial(make_schedule, config, steps, rates=rates)
    if own is None and not is_own(config.name):
        # At the base width nothing is scaled: the very same transformation.
        other = {pattern: factor for pattern, factor in (scales or {}).items() if factor != 1}
        scaled = {"scaled": functools.partial(_scaled, other)} if other else {}
        optimizer = OPTIMIZERS[config.name].make(config, rate, decays, **scaled)
    else:
        wrong = f"name = {config.name!r}: "
        if not (own is None or callable(own)):
            raise UserError(
                f"{wrong}expected a function of the learning rate, such as `lambda rate: optax.sgd(rate)`, so that the "
                "recipe's schedule holds and is logged"
            )
        with running("name", config.name, "function"):
            optimizer = make_piece(config.name, config.options, rate()) if own is None else own(rate())
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise UserError(
                f"{wrong}returns a {type(optimizer).__name__} of the learning rate; expected an Optax transformation, "
                "which has init and update"
            )
        optimizer = _held_to_its_contract(optimizer, config.name)
    if config.clip_norm is not None:
        optimizer = optax.chain(_clip_by_global_norm(config.clip_norm), optimizer)
    if config.ema is not None:
        optimizer = with_average(optimizer, config.ema)

    def init(params: Params) -> Any:
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern in exclude:
            # The defaults suit every model: one without biases is no mistake.
            if pattern not in OptimizerConfig().weight_decay_exclude and not fnmatch.filter(names, pattern):
                raise UserError(f"weight_decay_exclude: {pattern!r} matches none of the parameters {', '.join(names)}")
        return optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(optimizer).update)


def _scaled(scales: Mapping[str, float], updates: Params) -> Params:
    """Multiply the updates of parameters that a pattern names."""

    def scale(path: tuple[object, ...], update: jax.Array) -> jax.Array:
        factors = [factor for pattern, factor in scales.items() if fnmatch.fnmatch(_name(path), pattern)]
        return update * factors[0] if factors else update

    return jax.tree_util.tree_map_with_path(scale, updates)


def _held_to_its_contract(own: optax.GradientTransformation, name: str) -> optax.GradientTransformationExtraArgs:
    """Return somebody's own transformation, which raises UserError, while it is traced, where another would fail later.

    An update has the shapes of the gradients, and a state those of the one before it.
    """
    run, wrong = optax.with_extra_args_support(own).update, f"name = {name!r}: its "

    def init(params: Params) -> Any:
        with running("name", name, "init"):
            state = own.init(params)
        _described(state, f"{wrong}init")
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with running("name", name, "update"):
            returned: object = run(updates, state, params, **extra)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise UserError(f"{wrong}update returns a {type(returned).__name__}; expected (updates, state)")
        for what, before, after in (("updates", updates, returned[0]), ("state", state, returned[1])):
            had, has = (_described(tree, f"{wrong}update", what == "state") for tree in (before, after))
            like = "in the gradients" if what == "updates" else "before"
            for place in (place for place in (*had, *has) if had.get(place) != has.get(place)):
                now, was = (one.get(place, "nothing") for one in (has, had))
                raise UserError(f"{wrong}update returns {what}{place} of {now}; expected {was}, as {like}")
            trees: list[object] = [jax.tree.structure(tree) for tree in (before, after)]
            if trees[0] != trees[1]:
                raise UserError(f"{wrong}update returns {what} in {short(trees[1])}; expected {short(trees[0])}")
        return returned

    return optax.GradientTransformationExtraArgs(init, update)


def _described(tree: Any, wrong: str, dtypes: bool = True) -> dict[str, str]:
    """Return the shape of every array, and its dtype, by its place. Raises UserError where one is no array."""
    try:
        return {
            jax.tree_util.keystr(path): f"{jnp.result_type(leaf) if dtypes else ''}{list(jnp.shape(leaf))}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    except (TypeError, ValueError):
        kinds = sorted({type(leaf).__name__ for leaf in jax.tree.leaves(tree)})
        raise UserError(f"{wrong} returns {short(kinds)} in a tree; expected arrays alone") from None


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
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    of_param = {_keys(path): (param.shape, sharding) for (path, param), sharding in leaves}

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
