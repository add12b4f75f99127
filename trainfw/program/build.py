from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from trainfw import backends
from trainfw.models import Transformer, flops_per_token
from trainfw.optim import make_optimizer, make_schedule, optimizer_shardings
from trainfw.parallel import (
    AXES,
    Layout,
    Placement,
    Rules,
    Sharded,
    make_mesh,
    nearest_divisors,
    place,
    reorder_layers,
    stage_order,
    use_rules,
)
from trainfw.program.host import init_on_host
from trainfw.program.loss import Batch, next_token_loss
from trainfw.program.metrics import Mean
from trainfw.program.state import TrainState
from trainfw.recipe import Recipe

Metrics = dict[str, Mean]


@dataclass(frozen=True)
class Program:
    """What a recipe is on a set of devices. `train` runs it, `plan` compiles it, `check` reads it."""

    recipe: Recipe
    layout: Layout
    placement: Placement | None
    """Where the axes lie on `hardware.topology`; None without one, with devices in their own order."""
    mesh: Mesh
    rules: Rules
    graphdef: nnx.GraphDef[Transformer]
    abstract_state: TrainState
    """ShapeDtypeStructs with shardings."""
    abstract_batch: Batch
    """ShapeDtypeStructs (B, S) with shardings."""
    grad_shardings: Any
    """Nested dict: how the gradient of each parameter is kept."""
    layer_order: tuple[int, ...]
    """The layer at each place of the stacked parameters: not their true order where stages are interleaved."""
    init: Callable[[], TrainState]
    """The state before the first step, from `train.seed`; the same on every mesh."""
    train_step: Any
    """Jitted (state, batch) -> (state, metrics); the state is donated."""
    eval_step: Any
    """Jitted (params, batch) -> metrics."""

    def model(self, params: Any) -> Transformer:
        """The model with these parameters (a nested dict of arrays), their layers in true order."""
        return nnx.merge(self.graphdef, nnx.State(params))

    def in_true_order(self, params: Any) -> Any:
        """The state's parameters, their layers in the order in which the model runs them."""
        return reorder_layers(params, self.layer_order, sorted(self.layer_order))

    def compile_train_step(self) -> Any:
        """`train_step`, compiled ahead of time with the backend's options."""
        lowered = self.train_step.lower(self.abstract_state, self.abstract_batch)
        return lowered.compile(compiler_options=backends.current().compiler_options)

    def shard_batch(self, local_batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's rows (B / processes, S) as its part of the global batch (B, S)."""
        return {
            name: jax.make_array_from_process_local_data(self.abstract_batch[name].sharding, array)
            for name, array in local_batch.items()
        }

    @property
    def batch_share(self) -> tuple[int, int]:
        """(k, n): this process reads the k-th of n equal shares of every global batch.

        Processes whose devices hold the same rows have the same k. Raises UserError where a process's rows are not
        one such share, which happens when an axis of the batch runs inside instances and another across them.
        """
        rows, length = self.recipe.train.global_batch_size, self.recipe.data.sequence_length
        indices = self.abstract_batch["tokens"].sharding.addressable_devices_indices_map((rows, length))
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
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_state.params))

    @property
    def device_kind(self) -> str:
        return str(self.mesh.devices.flat[0].device_kind)

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of one update (forward and backward, causal attention, no recomputation)."""
        return self.tokens_per_step * flops_per_token(self.recipe.model, self.recipe.data.sequence_length)


def build_program(recipe: Recipe, devices: Sequence[jax.Device] | None = None) -> Program:
    """Turn a recipe and devices (default: all) into the program. Compiles and allocates nothing.

    Raises UserError where the recipe and the devices do not fit together.
    """
    devices = jax.devices() if devices is None else devices
    layout = _checked_layout(recipe, len(devices))
    topology = recipe.hardware.load()
    with recipe.blamed("parallel"):
        placement = None if topology is None else place(topology, layout, recipe.parallel.traffic)
    mesh = make_mesh(layout, devices, placement)
    with recipe.blamed("parallel.rules"):
        rules = Rules(mesh, recipe.parallel.rules, recipe.parallel.fsdp_shards)
    with recipe.blamed("optimizer"):
        optimizer = make_optimizer(recipe.optimizer, recipe.train.steps)
        schedule = make_schedule(recipe.optimizer, recipe.train.steps)
    seed, z_loss, accumulation = recipe.train.seed, recipe.train.z_loss, recipe.train.accumulation_steps

    layer_order = stage_order(recipe.model.num_layers, layout.pipeline, recipe.parallel.interleave)
    loss_of = functools.partial(next_token_loss, mask_documents=recipe.data.mask_documents)

    def make_model(key: jax.Array) -> Transformer:
        return Transformer(
            recipe.model,
            rngs=nnx.Rngs(key),
            compute_dtype=recipe.train.compute_dtype,
            remat=recipe.train.remat,
            scan_layers=recipe.train.scan_layers,
        )

    def init() -> TrainState:
        params_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))[0]
        params = nnx.to_pure_dict(nnx.state(make_model(params_key), nnx.Param))
        if layer_order != tuple(sorted(layer_order)):  # drawn in true order: the same model on every layout
            params["layers"] = jax.tree.map(lambda x: x[jnp.asarray(layer_order)], params["layers"])
        step_key = jax.random.key(seed, impl="rbg")  # the one generator whose draws Neuron's compiler takes
        return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(step_key))

    graphdef, variables = nnx.split(
        nnx.eval_shape(lambda: make_model(jax.random.key(0, impl="threefry2x32"))), nnx.Param
    )
    with recipe.blamed("parallel"):
        param_shardings = _shardings(variables, rules, "parameters")
        grad_shardings = _shardings(variables, rules, "gradients")
        update_shardings = _shardings(variables, rules, "optimizer")
    with recipe.blamed("optimizer"):
        shapes = jax.eval_shape(init)
    shardings = TrainState(
        step=rules.replicated,
        params=param_shardings,
        opt_state=optimizer_shardings(optimizer, shapes.params, update_shardings, rules.replicated),
        rng=rules.replicated,
    )

    def objective(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        with use_rules(rules):
            return loss_of(nnx.merge(graphdef, nnx.State(params)), batch, z_loss)

    def gradients(params: Any, batch: Batch) -> tuple[Any, Metrics]:
        grads, metrics = jax.grad(objective, has_aux=True)(params, batch)
        return jax.lax.with_sharding_constraint(grads, grad_shardings), metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if accumulation == 1:
            grads, metrics = gradients(state.params, batch)
        else:
            grads, metrics = _accumulate(lambda part: gradients(state.params, part), batch, accumulation)
        # Summed over all tokens and divided once, so that how a batch is split never weighs its tokens.
        count = jnp.maximum(metrics["loss"].count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        # A device updates the share of which it keeps the optimizer's state, and only then is it gathered again.
        grads = jax.lax.with_sharding_constraint(grads, update_shardings)
        params = jax.lax.with_sharding_constraint(state.params, update_shardings)
        with use_rules(rules):
            updates, opt_state = optimizer.update(grads, state.opt_state, params)
        metrics["grad_norm"] = Mean(optax.global_norm(grads), 1.0)
        metrics["update_norm"] = Mean(optax.global_norm(updates), 1.0)
        metrics["learning_rate"] = Mean(jnp.float32(schedule(state.step)), 1.0)
        params = jax.lax.with_sharding_constraint(optax.apply_updates(params, updates), update_shardings)
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    def eval_step(params: Any, batch: Batch) -> Metrics:
        # In the same parts as in training, which is how much of the batch the devices have room for.
        def metrics(part: Batch) -> Metrics:
            with use_rules(rules):
                return loss_of(nnx.merge(graphdef, nnx.State(params)), part, 0.0)[1]

        return metrics(batch) if accumulation == 1 else _accumulate(metrics, batch, accumulation)

    rows, length = recipe.train.global_batch_size, recipe.data.sequence_length
    batch_sharding = rules.sharding("batch", (rows, length), ("batch", "sequence"))
    abstract_batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding)
        for name, dtype in {
            "tokens": jnp.int32,
            "targets": jnp.int32,
            "segment_ids": jnp.int32,
            "positions": jnp.int32,
            "loss_mask": jnp.float32,
        }.items()
    }
    program = Program(
        recipe=recipe,
        layout=layout,
        placement=placement,
        mesh=mesh,
        rules=rules,
        graphdef=graphdef,
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        ),
        abstract_batch=abstract_batch,
        grad_shardings=grad_shardings,
        layer_order=layer_order,
        init=init_on_host(init, shardings) if backends.current().host_init else jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, rules.replicated),
            donate_argnums=0,
        ),
        eval_step=jax.jit(eval_step, in_shardings=(param_shardings, batch_sharding), out_shardings=rules.replicated),
    )
    with recipe.blamed("parallel"):
        program.train_step.trace(program.abstract_state, abstract_batch)  # a rule that cannot apply shows here
    return program


def _accumulate(compute: Callable[[Batch], Any], batch: Batch, accumulation: int) -> Any:
    """The sum of what `compute` returns over `accumulation` microbatches, one after the other."""

    def split(x: jax.Array) -> jax.Array:
        # Every accumulation-th row, so that each device keeps to its own rows.
        return x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(compute, jax.tree.map(lambda x: x[0], parts)),
    )
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, compute(part)), None), zeros, parts)[0]


def _shardings(variables: Any, rules: Rules, of: Sharded) -> Any:
    """Nested dict of shardings, by the dim names each parameter carries."""
    flat = {
        path: rules.weight_sharding(".".join(map(str, path)), variable.shape, variable.get_metadata()["axes"], of)
        for path, variable in nnx.to_flat_state(variables)
    }
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def _checked_layout(recipe: Recipe, num_devices: int) -> Layout:
    """The layout on this many devices, once everything that must fit has been seen to fit."""
    hardware, model, rows = recipe.hardware, recipe.model, recipe.train.global_batch_size
    topology = hardware.load()
    if topology is not None:
        expected = topology.cores
        if expected != num_devices:
            raise recipe.error(
                "hardware.topology",
                f"{hardware.count} of it is {expected} devices, but this is {num_devices}; "
                f"simulate them with --devices {expected}, or set hardware.topology=null to run on what there is",
            )
    with recipe.blamed("parallel"):
        layout = Layout.resolve(recipe.parallel, num_devices, simulate=topology is None)
    for axis in AXES:
        if layout.sizes[axis] > 1 and axis in ("pipeline", "expert", "context"):
            raise recipe.error(f"parallel.{axis}", "this axis is not built yet; use data, fsdp and tensor")
    for field in ("num_heads", "num_kv_heads"):
        if getattr(model, field) % layout.tensor:
            heads = math.gcd(model.num_heads, model.num_kv_heads)
            raise recipe.error(
                f"model.{field}",
                f"does not divide over parallel.tensor = {layout.tensor}{nearest_divisors(heads, layout.tensor)}",
            )
    if problem := layout.batch_problem(rows, recipe.train.accumulation_steps):
        raise recipe.error("train.global_batch_size", problem)
    return layout
