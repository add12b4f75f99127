"""The models of a program, by role: how each is put together from what learns and what is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.adapters import attach, with_magnitudes
from trainfw.models import Frozen, ModelOptions, TokenModel, build_model, freeze
from trainfw.parallel import Rules, Sharded
from trainfw.program.fit import Fit
from trainfw.recipe import Recipe
from trainfw.weights import Tree, as_kept, kept_shardings


@dataclass(frozen=True)
class ModelSet:
    """The learner, and the frozen models that an objective needs, as graphs without their arrays.

    With an adapter, the learner's own weights are frozen in the role `base`, and every other role is that base with its
    adapter off, at no weights more. Without one, each other role has frozen weights of its own.
    """

    recipe: Recipe
    fit: Fit
    graphdef: nnx.GraphDef[Any]
    variables: nnx.State
    """Abstract, of what learns, with the names of its dims."""
    frozen_graphdef: nnx.GraphDef[Any]
    """Graph of a model that is frozen as a whole, where there are roles for one."""
    frozen: Mapping[str, nnx.State]
    """Abstract, by role, of what does not learn."""
    roles: tuple[str, ...]

    def learner(self, params: Tree, frozen: Mapping[str, Tree]) -> Any:
        """Put the model together that learns."""
        return nnx.merge(self.graphdef, nnx.State(params), nnx.State(frozen.get("base", {})))

    def models(self, params: Tree, frozen: Mapping[str, Tree]) -> dict[str, TokenModel]:
        """Put all models together, by role; the one that learns is `learner`."""
        weights = {role: frozen["base" if "base" in frozen else role] for role in self.roles}
        return {"learner": self.learner(params, frozen)} | {
            role: nnx.merge(self.frozen_graphdef, nnx.State({}), nnx.State(tree)) for role, tree in weights.items()
        }

    def draw(self) -> tuple[Tree, dict[str, Tree]]:
        """Draw (what learns, what does not, by role) from the seed."""
        key = jax.random.split(jax.random.key(self.recipe.train.seed, impl="threefry2x32"))[0]
        model, order = _make(self.recipe, self.fit, key), self.fit.layer_order
        drawn = tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, Frozen))
        if order != tuple(sorted(order)):  # drawn in true order: the same model on every layout
            for part in drawn:
                part["layers"] = jax.tree.map(lambda x: x[jnp.asarray(order)], part.get("layers", {}))
        params = drawn[0]
        if self.recipe.adapter is None:
            return params, {role: as_kept(params, self.recipe) for role in self.roles}
        frozen = {"base": as_kept(drawn[1], self.recipe)}
        return self.measured(params, frozen), frozen

    def measured(self, params: Tree, frozen: Mapping[str, Tree]) -> Tree:
        """Return an adapter's parameters with DoRA's magnitudes those of the base as it is kept."""
        model = nnx.merge(self.graphdef, nnx.State(params), nnx.State(frozen["base"]))
        with_magnitudes(model)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def shardings(self, rules: Rules, of: Sharded) -> Tree:
        """Return a nested dict of what learns, by the dim names that each parameter carries."""
        flat = {
            path: rules.weight_sharding(".".join(map(str, path)), variable.shape, variable.get_metadata()["axes"], of)
            for path, variable in nnx.to_flat_state(self.variables)
        }
        return nnx.to_pure_dict(nnx.from_flat_state(flat))

    def frozen_shardings(self, rules: Rules) -> dict[str, Tree]:
        """Return nested dicts of what does not learn, by role."""
        return {role: kept_shardings(variables, self.recipe, rules) for role, variables in self.frozen.items()}


def model_set(recipe: Recipe, fit: Fit, roles: Sequence[str]) -> ModelSet:
    """Return a recipe's models. Raises UserError for an adapter that the model cannot take."""

    def key() -> jax.Array:  # traced: made here, it would run on a device
        return jax.random.key(0, impl="threefry2x32")

    graphdef, variables, base = nnx.split(  # type: ignore[misc]
        nnx.eval_shape(lambda: _make(recipe, fit, key())), nnx.Param, Frozen
    )
    own = {} if recipe.adapter is None else {"base": base}
    if not roles:  # nothing more is traced
        return ModelSet(recipe, fit, graphdef, variables, graphdef, own, ())
    bare = nnx.eval_shape(lambda: _bare(recipe, fit, nnx.Rngs(key())))
    freeze(bare)
    frozen_graphdef, _, whole = nnx.split(bare, nnx.Param, Frozen)  # type: ignore[misc]
    frozen = own or dict.fromkeys(roles, whole)
    return ModelSet(recipe, fit, graphdef, variables, frozen_graphdef, frozen, tuple(roles))


def _make(recipe: Recipe, fit: Fit, key: jax.Array) -> Any:
    rngs = nnx.Rngs(key)
    model = _bare(recipe, fit, rngs)
    if recipe.adapter is not None:
        with recipe.blamed("adapter"):
            attach(model, recipe.adapter, rngs)
    return model


def _bare(recipe: Recipe, fit: Fit, rngs: nnx.Rngs) -> Any:
    options = ModelOptions(
        compute_dtype=recipe.train.compute_dtype,
        matmul_dtype=recipe.train.matmul_dtype,
        remat=recipe.train.remat,
        scan_layers=recipe.train.scan_layers,
        prefetch=recipe.parallel.prefetch and fit.rules.gathers,
        ring=recipe.parallel.context_attention == "ring",
        microbatch_rows=fit.microbatch_rows,
        interleave=recipe.parallel.interleave,
    )
    with recipe.blamed("model"):
        return build_model(recipe.model, options, rngs)
