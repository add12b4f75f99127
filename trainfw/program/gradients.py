"""Computation on one device's part of a batch: a loss and its gradients, over microbatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from trainfw import backends
from trainfw.models import restack, unstack
from trainfw.objectives import Batch, Draw, Metrics, Objective, Sums, check_returned, metrics_of
from trainfw.parallel import Replica, all_reduce, axis_index, axis_size, reduce_gradient
from trainfw.pieces import is_own, running
from trainfw.program.fit import Fit
from trainfw.program.models import ModelSet
from trainfw.recipe import Recipe


@dataclass(frozen=True)
class LocalComputation:
    """The loss of an objective and its gradients, on one device."""

    recipe: Recipe
    fit: Fit
    models: ModelSet
    objective: Objective

    def loss(self, params: Any, frozen: Any, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return the objective's loss of one microbatch, and its sums."""
        models, name = self.models.models(params, frozen), self.recipe.objective.name
        if not is_own(name):
            return self.objective.loss(models, batch, draw)
        with self.recipe.blamed("objective"):
            with running("name", name, "loss"):
                returned: object = self.objective.loss(models, batch, draw)
            return check_returned(returned, name, self.objective.unit)

    def gradients(
        self, params: Any, wholes: Any, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Any, Metrics]:
        """Return (gradients of the summed loss, reduced as they are kept; metrics of all devices).

        `wholes` are the parameters where those are whole on every device and their gradients are not; else None.
        """
        rules, recipe = self.fit.rules, self.recipe

        def differentiable(params: Any, part: tuple[Batch, Any]) -> tuple[jax.Array, Sums]:
            if wholes is not None:
                params = self._named(
                    lambda dims, p, w: Replica(p, w) if any(map(rules.gathered, dims)) else p, params, wholes
                )
            return self.loss(params, frozen, part[0], Draw(training=True, key=key, ids_B=part[1]))

        with self.fit.tracing():
            ids = None if key is None else _row_ids(next(iter(batch.values())).shape[0])
            # Along `data` sums wait until the last microbatch, and then take no more than a device's own share.
            alone = recipe.train.accumulation_steps > 1 and self.fit.mesh.size == 1
            used = self._narrowed(params) if alone and backends.current().casts_once else params
            # Or the layers' gradients are stacked for each microbatch.
            apart = alone and not recipe.train.scan_layers and "layers" in params
            if apart:
                used = used | {"layers": unstack(used["layers"])}

            def differentiate(part: tuple[Batch, Any]) -> tuple[Any, Sums]:
                grads, sums = jax.grad(differentiable, has_aux=True)(used, part)
                return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

            grads, sums = accumulate(differentiate, (batch, ids), recipe.train.accumulation_steps)
            if apart:
                grads = grads | {"layers": restack(grads["layers"])}
            return self._named(lambda dims, g: reduce_gradient(g, dims, rules), grads), self._metrics(sums)

    def metrics(self, params: Any, frozen: Any, batch: Batch) -> Metrics:
        """Return the metrics of all devices, without gradients."""
        # In the same parts as in training, which is how much of the batch the devices have room for.
        with self.fit.tracing():
            draw = Draw(training=False)
            sums = accumulate(
                lambda part: self.loss(params, frozen, part, draw)[1], batch, self.recipe.train.accumulation_steps
            )
            return self._metrics(sums)

    def _metrics(self, sums: Sums) -> Metrics:
        flat, unravel = ravel_pytree(sums)
        return metrics_of(unravel(all_reduce(flat, self.fit.mesh.axis_names)))  # in one collective

    def _named(self, function: Callable[..., Any], tree: Any, *trees: Any) -> Any:
        """Return `function(names of its dims, leaf, ...)` of every parameter."""
        names = [weight.axes for weight in self._weights()]
        leaves = (jax.tree.leaves(t) for t in (tree, *trees))
        return jax.tree.unflatten(jax.tree.structure(tree), map(function, names, *leaves))

    def _narrowed(self, params: Any) -> Any:
        """Return the layers' matrices in the dtype in which alone they are used."""
        stacked = [
            w.axes[0] == "layers" and len(w.axes) > 2 and not w.get_metadata().get("wide") for w in self._weights()
        ]
        flags = jax.tree.unflatten(jax.tree.structure(params), stacked)
        dtype = self.recipe.train.compute_dtype
        return jax.tree.map(lambda x, yes: x.astype(dtype) if yes else x, params, flags)

    def _weights(self) -> list[Any]:
        return jax.tree.leaves(self.models.variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def accumulate(compute: Callable[[Any], Any], batch: Any, accumulation: int) -> Any:
    """Return the sum of what `compute` returns over `accumulation` microbatches, one after the other."""
    if accumulation == 1:
        return compute(batch)

    def split(x: jax.Array) -> jax.Array:
        # Every accumulation-th row, so that each device keeps to its own rows.
        return x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(compute, jax.tree.map(lambda x: x[0], parts)),
    )
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, compute(part)), None), zeros, parts)[0]


def on_every_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return `function` of each device's parts of its arguments."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _row_ids(rows: int) -> jax.Array:
    """Return numbers of this device's rows, or parts of rows, that no other has; alike along `tensor`. i32[rows]"""
    place = jnp.int32(0)
    for axis in ("pipeline", "data", "fsdp", "expert", "context"):
        place = place * axis_size(axis) + axis_index(axis)
    return place * rows + jnp.arange(rows, dtype=jnp.int32)
