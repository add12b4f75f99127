from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from trainfw import backends
from trainfw.models import flops_per_token
from trainfw.objectives import Batch, Objective, Schema, check_drawn, drawn_batch
from trainfw.optim import Traits, average_of
from trainfw.parallel import Layout, Placement, Rules, reorder_layers, zigzag_order
from trainfw.pieces import is_own
from trainfw.program.fit import Fit
from trainfw.program.models import ModelSet
from trainfw.program.skip_bad_steps import start_guard
from trainfw.program.state import TrainState
from trainfw.recipe import Recipe
from trainfw.weights import Tree, count_weights

_HELD_OUT = 2**32
"""Added to the seed for what is drawn for held-out rows."""


@dataclass(frozen=True)
class Function:
    """One jitted entry of a program, which is run, planned, checked and measured."""

    name: str
    jitted: Any = field(repr=False)
    arguments: tuple[Any, ...] = field(repr=False)
    """Pytrees of ShapeDtypeStructs with shardings: what it is compiled for."""
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Options of the compiler, besides the backend's."""

    def trace(self) -> jax.stages.Traced:
        return self.jitted.trace(*self.arguments)

    def lower(self) -> jax.stages.Lowered:
        return self.jitted.lower(*self.arguments)

    def compile(self) -> Any:
        """Return it compiled ahead of time with the backend's options."""
        compiled = self.lower().compile(compiler_options={**backends.current().compiler_options, **self.options})
        backends.release_freed_memory()
        return compiled


Functions = dict[str, Function]
"""Functions by name: `train` (state, batch) -> (state, metrics); `evaluate` (params, frozen, batch) -> metrics; of
models of images, `denoise` (params, frozen, inputs) -> prediction."""


@dataclass(frozen=True, repr=False)
class Program:
    """A recipe on a set of devices, as functions. `train` runs them, `plan` compiles them, `check` reads them."""

    recipe: Recipe
    objective: Objective
    schema: Schema
    """The arrays of a global batch."""
    fit: Fit
    models: ModelSet
    traits: Traits
    abstract_state: TrainState
    """ShapeDtypeStructs with shardings."""
    abstract_batch: Batch
    """ShapeDtypeStructs with shardings, in the shapes of `schema`."""
    grad_shardings: Any
    """Nested dict: how the gradient of each parameter is kept."""
    init: Callable[..., TrainState]
    """Returns the state before the first step, from `train.seed` and `model.from`; the same on every mesh."""
    load_frozen: Callable[..., Any]
    """Returns the part of it that is in no checkpoint. Both take `progress`, and read no more than an array at a
    time."""
    functions: Functions = field(default_factory=dict)
    gradients: Any = None
    """Jitted (params, frozen, batch) -> (gradients, metrics): what `train_step` hands to the optimizer, of the mean
    loss."""

    def __repr__(self) -> str:
        return f"Program({self.recipe.name!r}, {self.layout}, functions: {', '.join(self.functions)})"

    @property
    def layout(self) -> Layout:
        return self.fit.layout

    @property
    def placement(self) -> Placement | None:
        """Return where the axes lie on `hardware.topology`; None without one, with devices in their own order."""
        return self.fit.placement

    @property
    def mesh(self) -> Mesh:
        return self.fit.mesh

    @property
    def rules(self) -> Rules:
        return self.fit.rules

    @property
    def graphdef(self) -> nnx.GraphDef[Any]:
        """The learner's."""
        return self.models.graphdef

    @property
    def layer_order(self) -> tuple[int, ...]:
        """The layer at each place of the stacked parameters: not their true order where stages are interleaved."""
        return self.fit.layer_order

    @property
    def train_step(self) -> Any:
        """Jitted (state, batch) -> (state, metrics); the state is donated, unless the recipe says otherwise."""
        return self.functions["train"].jitted

    @property
    def eval_step(self) -> Any:
        """Jitted (params, frozen, batch) -> metrics."""
        return self.functions["evaluate"].jitted

    def compile_train_step(self) -> Any:
        """Return `train_step` compiled ahead of time with the backend's options."""
        return self.functions["train"].compile()

    def compile_eval_step(self) -> Any:
        """Return `eval_step`, likewise."""
        return self.functions["evaluate"].compile()

    def model(self, params: Any, frozen: Any = None) -> Any:
        """Return the learner with these parameters (nested dicts of arrays, those of `frozen` by role).

        Their layers are to be in true order.
        """
        return self.models.learner(params, frozen or {})

    def learnt(self, state: TrainState) -> Tree:
        """Return what is validated and sampled of a state: its parameters, or their average (`optimizer.ema`)."""
        average = average_of(state.opt_state)
        if average is None:
            return state.params
        return jax.device_put(average, jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state.params))

    def restore_guard(self, saved: Mapping[str, Any]) -> Any:
        """Return the state's guard from a checkpoint's meta (nested lists), or a new one where that has none."""
        if not self.abstract_state.guard:
            return {}
        values = {name: np.asarray(value, np.float32) for name, value in (saved or start_guard()).items()}
        return jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), values, self.abstract_state.guard)

    def in_true_order(self, params: Any) -> Any:
        """Return parameters of the state, their layers in the order in which the model runs them."""
        return reorder_layers(params, self.layer_order, sorted(self.layer_order))

    def frozen_in_true_order(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state's frozen weights, likewise."""
        return {role: self.in_true_order(tree) for role, tree in frozen.items()}

    def shard_batch(self, local_batch: Mapping[str, np.ndarray], *, training: bool = True) -> Batch:
        """Return this process's rows (B / processes of each array) as its part of the global batch.

        What the objective draws for them is added; that of validation is not that of training.
        """
        seed, name = self.recipe.train.seed + (0 if training else _HELD_OUT), self.recipe.objective.name
        with self.recipe.blamed("objective"):
            local_batch = drawn_batch(self.objective, local_batch, seed)
            if is_own(name):
                check_drawn(local_batch, self.schema, name)
        share, shares = self.batch_share
        first = share * self.schema.sizes["batch"] // shares
        context = self.layout.context

        def place(name: str, array: np.ndarray) -> jax.Array:
            like = self.abstract_batch[name]
            dims = self.schema.fields[name].dims

            def local(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(like.shape[0])
                part = array[start - first : stop - first]
                if "sequence" not in dims:
                    return part[:, *index[1:]]
                at = dims.index("sequence")
                columns = zigzag_order(like.shape[at], context)[index[at]] if context > 1 else index[at]
                return part[:, *index[1:at], columns, *index[at + 1 :]]

            return jax.make_array_from_callback(like.shape, like.sharding, local)

        return {name: place(name, array) for name, array in local_batch.items()}

    @property
    def batch_share(self) -> tuple[int, int]:
        """(k, n): this process reads the k-th of n equal shares of every global batch.

        Processes whose devices hold the same rows have the same k. Raises UserError where a process's rows are not
        one such share, which happens when an axis of the batch runs inside instances and another across them.
        """
        like = next(iter(self.abstract_batch.values()))
        rows = like.shape[0]
        indices = like.sharding.addressable_devices_indices_map(like.shape)
        mine = {row for index in indices.values() for row in range(*index[0].indices(rows))}
        first, count = min(mine), len(mine)
        if max(mine) - first + 1 != count or rows % count or first % count:
            raise self.recipe.error(
                "parallel.data",
                f"leaves process {jax.process_index()} rows {sorted(mine)[:4]}... of the global batch, not one "
                f"contiguous share; let fsdp or data span whole instances",
            )
        return first // count, rows // count

    @property
    def num_parameters(self) -> int:
        """Weights that learn."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_state.params))

    @property
    def num_frozen(self) -> int:
        """Weights that do not, of all roles; each counts as one, however few bits it has."""
        return sum(count_weights(tree) for tree in self.abstract_state.frozen.values())

    @property
    def device_kind(self) -> str:
        return str(self.mesh.devices.flat[0].device_kind)

    @property
    def tokens_per_step(self) -> int:
        return self.schema.tokens

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of one update (forward and backward, no recomputation, of causal attention the half that counts).

        A frozen weight takes two thirds of one that learns: its product, and the gradient of its input. A frozen model
        in another role than the base takes a third: its forward pass.
        """
        whole = flops_per_token(self.recipe.model, self.recipe.sequence_length)
        learner = whole
        if self.recipe.adapter is not None:
            learner = whole * 2 / 3 + 6 * self.num_parameters
        return self.tokens_per_step * (learner + len(self.objective.roles) * whole / 3)
