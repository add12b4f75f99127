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
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trainfw import backends
from trainfw.adapters import attach
from trainfw.models import (
    AdapterInputs,
    Frozen,
    Transformer,
    dispatch_problem,
    flops_per_token,
    restack,
    routing_problem,
    unstack,
)
from trainfw.optim import make_optimizer, make_schedule, optimizer_shardings
from trainfw.parallel import (
    Layout,
    Placement,
    Replica,
    Rules,
    Sharded,
    all_reduce,
    axis_index,
    axis_size,
    context_problem,
    layers_problem,
    make_mesh,
    nearest_divisors,
    place,
    reduce_gradient,
    reorder_layers,
    stage_order,
    use_rules,
    zigzag_order,
)
from trainfw.program.guard import judge, keep_where, start_guard
from trainfw.program.initial import initial_frozen, initial_state, measured
from trainfw.program.kept import as_kept, count_weights, kept_shardings
from trainfw.program.loss import Batch, Sums, next_token_loss
from trainfw.program.metrics import Mean
from trainfw.program.state import TrainState
from trainfw.recipe import Recipe, expect_recipe

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
    init: Callable[..., TrainState]
    """The state before the first step, from `train.seed` and `model.from`; the same on every mesh."""
    load_frozen: Callable[..., Any]
    """The part of it that is in no checkpoint. Both take `progress`, and read no more than an array at a time."""
    train_step: Any
    """Jitted (state, batch) -> (state, metrics); the state is donated, unless the recipe says otherwise.
    `compile_train_step` is what trains."""
    gradients: Any
    """Jitted (params, frozen, batch) -> (gradients, metrics): what `train_step` hands to the optimizer, of the mean
    loss."""
    eval_step: Any
    """Jitted (params, frozen, batch) -> metrics."""

    def model(self, params: Any, frozen: Any = None) -> Transformer:
        """The model with these parameters (a nested dict of arrays), their layers in true order."""
        return nnx.merge(self.graphdef, nnx.State(params), nnx.State(frozen or {}))

    def restore_guard(self, saved: Mapping[str, Any]) -> Any:
        """The state's guard from a checkpoint's meta (nested lists), or a new one where that has none."""
        if not self.abstract_state.guard:
            return {}
        values = {name: np.asarray(value, np.float32) for name, value in (saved or start_guard()).items()}
        return jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), values, self.abstract_state.guard)

    def in_true_order(self, params: Any) -> Any:
        """The state's parameters (or frozen ones), their layers in the order in which the model runs them."""
        return reorder_layers(params, self.layer_order, sorted(self.layer_order))

    def compile_train_step(self) -> Any:
        """`train_step`, compiled ahead of time with the backend's options."""
        return self._compiled(self.train_step.lower(self.abstract_state, self.abstract_batch))

    def compile_eval_step(self) -> Any:
        """`eval_step`, likewise."""
        state = self.abstract_state
        return self._compiled(self.eval_step.lower(state.params, state.frozen, self.abstract_batch))

    def _compiled(self, lowered: Any) -> Any:
        compiled = lowered.compile(compiler_options=backends.current().compiler_options)
        backends.release_freed_memory()
        return compiled

    def shard_batch(self, local_batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's rows (B / processes, S) as its part of the global batch (B, S)."""
        rows, length = self.recipe.train.global_batch_size, self.recipe.data.sequence_length
        share, shares = self.batch_share
        first = share * rows // shares
        columns = zigzag_order(length, self.layout.context) if self.layout.context > 1 else None

        def place(name: str, array: np.ndarray) -> jax.Array:
            def local(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(rows)
                part = array[start - first : stop - first]
                return part[:, index[1] if columns is None else columns[index[1]]]

            return jax.make_array_from_callback((rows, length), self.abstract_batch[name].sharding, local)

        return {name: place(name, array) for name, array in local_batch.items()}

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
        """What learns."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_state.params))

    @property
    def num_frozen(self) -> int:
        """What does not; each weight counts as one, however few bits it has."""
        return count_weights(self.abstract_state.frozen)

    @property
    def device_kind(self) -> str:
        return str(self.mesh.devices.flat[0].device_kind)

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of one update (forward and backward, causal attention, no recomputation).

        A frozen weight takes two thirds of one that learns: its product, and the gradient of its input.
        """
        whole = flops_per_token(self.recipe.model, self.recipe.data.sequence_length)
        if self.recipe.adapter is not None:
            whole = whole * 2 / 3 + 6 * self.num_parameters
        return self.tokens_per_step * whole


def build_program(
    recipe: Recipe, devices: Sequence[jax.Device] | None = None, *, stands_in: bool | None = None
) -> Program:
    """Turn a recipe and devices (default: all) into the program. Compiles and allocates nothing.

    Args:
        stands_in: whether a CPU stands for other hardware, where the CPU's own kernels are not what that would run.
            None: where `hardware.topology` is of other hardware, or the backend is simulated.

    Raises UserError where the recipe and the devices do not fit together.
    """
    expect_recipe(recipe)
    devices = jax.devices() if devices is None else devices
    layout = _checked_layout(recipe, len(devices))
    topology = recipe.hardware.load()
    with recipe.blamed("parallel"):
        placement = None if topology is None else place(topology, layout, recipe.parallel.traffic)
    if placement is not None and not placement.hosts_read_shares:
        raise recipe.error(
            "parallel.traffic",
            f"{layout} is placed so that a host's rows are not one share of the batch; say what each axis moves "
            "(`trainfw check` prints it), so that axes are placed by it, or let fsdp or data span whole instances",
        )
    mesh = make_mesh(layout, devices, placement)
    with recipe.blamed("parallel.rules"):
        rules = Rules(mesh, recipe.parallel.rules, recipe.parallel.fsdp_shards)
    if recipe.adapter is not None and recipe.optimizer.name == "muon":
        raise recipe.error(
            "optimizer.name", "updates whole kernels, of which an adapter trains none; use adamw or lion"
        )
    with recipe.blamed("optimizer"):
        optimizer = make_optimizer(recipe.optimizer, recipe.train.steps)
        schedule = make_schedule(recipe.optimizer, recipe.train.steps)
    rows, length = recipe.train.global_batch_size, recipe.data.sequence_length
    seed, z_loss, accumulation = recipe.train.seed, recipe.train.z_loss, recipe.train.accumulation_steps

    microbatch_rows = _microbatch_rows(recipe, layout)
    layer_order = stage_order(recipe.model.num_layers, layout.pipeline, recipe.parallel.interleave)
    loss_of = functools.partial(
        next_token_loss, chunk=recipe.train.loss_chunk, mask_documents=recipe.data.mask_documents
    )
    adapter, faults = recipe.adapter, recipe.faults
    backend = backends.current()
    if stands_in is None:
        stands_in = backend.simulated or (topology is not None and not topology.is_cpu)
    kernels, device_kind = backend.platform != "cpu" or not stands_in, _device_kind(recipe)

    def make_model(key: jax.Array) -> Transformer:
        rngs = nnx.Rngs(key)
        model = Transformer(
            recipe.model,
            rngs=rngs,
            compute_dtype=recipe.train.compute_dtype,
            matmul_dtype=recipe.train.matmul_dtype,
            remat=recipe.train.remat,
            scan_layers=recipe.train.scan_layers,
            prefetch=recipe.parallel.prefetch and rules.gathers,
            ring=recipe.parallel.context_attention == "ring",
            microbatch_rows=microbatch_rows,
            interleave=recipe.parallel.interleave,
        )
        if adapter is not None:
            with recipe.blamed("adapter"):
                attach(model, adapter, rngs)
        return model

    @jax.jit  # this and `start`, so that they are traced once: for the shapes here, and to run
    def draw() -> tuple[Any, Any]:
        """(what learns, what does not), from the seed."""
        params_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))[0]
        model = make_model(params_key)
        drawn = tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, Frozen))
        if layer_order != tuple(sorted(layer_order)):  # drawn in true order: the same model on every layout
            for part in drawn:
                part["layers"] = jax.tree.map(lambda x: x[jnp.asarray(layer_order)], part.get("layers", {}))
        params, frozen = drawn[0], as_kept(drawn[1], recipe)
        return params if adapter is None else measured(graphdef, params, frozen), frozen

    @jax.jit
    def start(params: Any, frozen: Any) -> TrainState:
        step_key = jax.random.key(seed, impl="rbg")  # the one generator whose draws Neuron's compiler takes
        guard = {} if faults.spike_sigma is None else start_guard()
        return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(step_key), frozen, guard)

    def init() -> TrainState:
        return start(*draw())

    graphdef, variables, frozen_variables = nnx.split(  # type: ignore[misc]
        nnx.eval_shape(lambda: make_model(jax.random.key(0, impl="threefry2x32"))), nnx.Param, Frozen
    )
    with recipe.blamed("parallel"):
        param_shardings = _shardings(variables, rules, "parameters")
        grad_shardings = _shardings(variables, rules, "gradients")
        update_shardings = _shardings(variables, rules, "optimizer")
    frozen_shardings = kept_shardings(frozen_variables, recipe, rules)
    draws = adapter is not None and adapter.dropout > 0
    weights = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = [weight.axes for weight in weights]

    def named(function: Callable[..., Any], tree: Any, *trees: Any) -> Any:
        """`function(names of its dims, leaf, ...)` of every parameter."""
        leaves = (jax.tree.leaves(t) for t in (tree, *trees))
        return jax.tree.unflatten(jax.tree.structure(tree), map(function, names, *leaves))

    def narrowed(params: Any) -> Any:
        """The layers' matrices in the dtype in which alone they are used."""
        stacked = [w.axes[0] == "layers" and len(w.axes) > 2 and not w.get_metadata().get("wide") for w in weights]
        flags = jax.tree.unflatten(jax.tree.structure(params), stacked)
        return jax.tree.map(lambda x, yes: x.astype(recipe.train.compute_dtype) if yes else x, params, flags)

    with recipe.blamed("optimizer"):
        shapes = jax.eval_shape(init)
    shardings = TrainState(
        step=rules.replicated,
        params=param_shardings,
        opt_state=optimizer_shardings(optimizer, shapes.params, update_shardings, rules.replicated),
        rng=rules.replicated,
        frozen=frozen_shardings,
        guard=jax.tree.map(lambda _: rules.replicated, shapes.guard),
    )
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )

    # What follows runs on each device, on its own parts of everything.
    def local_loss(
        params: Any, frozen: Any, batch: Batch, z_loss: float, key: jax.Array | None = None
    ) -> tuple[jax.Array, Sums]:
        adapters = None if key is None else AdapterInputs(key=key, ids_B=batch["ids"])
        return loss_of(nnx.merge(graphdef, nnx.State(params), nnx.State(frozen)), batch, z_loss, adapters=adapters)

    def metrics_of(sums: Sums) -> Metrics:
        flat, unravel = ravel_pytree(sums)
        sums = unravel(all_reduce(flat, mesh.axis_names))  # in one collective
        router = sums.pop("router", None)
        if router is not None:
            sums |= {name: Mean(*pair) for name, pair in router.metrics(recipe.model.moe).items()}
        return sums

    def local_gradients(
        params: Any, wholes: Any, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Any, Metrics]:
        def objective(params: Any, part: Batch) -> tuple[jax.Array, Sums]:
            if wholes is not None:
                params = named(lambda n, p, w: Replica(p, w) if any(map(rules.gathered, n)) else p, params, wholes)
            return local_loss(params, frozen, part, z_loss, key)

        with use_rules(rules), backends.own_kernels(kernels), backends.standing_for(device_kind):
            if key is not None:
                batch = batch | {"ids": _row_ids(batch["tokens"].shape[0])}
            # Along `data` sums wait until the last microbatch, and then take no more than a device's own share.
            alone = accumulation > 1 and mesh.size == 1
            used = narrowed(params) if alone and backend.casts_once else params
            # Or the layers' gradients are stacked for each microbatch.
            apart = alone and not recipe.train.scan_layers and "layers" in params
            if apart:
                used = used | {"layers": unstack(used["layers"])}

            def differentiate(part: Batch) -> tuple[Any, Sums]:
                grads, sums = jax.grad(objective, has_aux=True)(used, part)
                return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

            grads, sums = _accumulate(differentiate, batch, accumulation)
            if apart:
                grads = grads | {"layers": restack(grads["layers"])}
            return named(lambda n, g: reduce_gradient(g, n, rules), grads), metrics_of(sums)

    def local_metrics(params: Any, frozen: Any, batch: Batch) -> Metrics:
        # In the same parts as in training, which is how much of the batch the devices have room for.
        with use_rules(rules), backends.own_kernels(kernels), backends.standing_for(device_kind):
            return metrics_of(_accumulate(lambda part: local_loss(params, frozen, part, 0.0)[1], batch, accumulation))

    specs, update_specs, grad_specs, frozen_specs = (
        jax.tree.map(lambda sharding: sharding.spec, tree)
        for tree in (param_shardings, update_shardings, grad_shardings, frozen_shardings)
    )
    batch_spec = rules.spec("batch", (rows, length), ("batch", "sequence"))
    twice = rules.fsdp_shards == "gradients" and mesh.size > 1  # parameters are whole, and gradients are not
    gradient_sums = _on_every_device(
        local_gradients,
        mesh,
        (grad_specs if twice else specs, specs if twice else None, frozen_specs, batch_spec, P()),
        (update_specs, P()),
    )
    eval_step = _on_every_device(local_metrics, mesh, (specs, frozen_specs, batch_spec), P())

    # And what follows on all of them.
    def gradients(params: Any, frozen: Any, batch: Batch, key: jax.Array | None = None) -> tuple[Any, Metrics]:
        sums, metrics = gradient_sums(params, params if twice else None, frozen, batch, key)
        # Summed over all tokens and divided once, so that how a batch is split never weighs its tokens.
        # By its inverse: compilers do a product again wherever it is read, and write a quotient down.
        share = 1.0 / jnp.maximum(metrics["loss"].count, 1.0)
        metrics["grad_norm"] = Mean(optax.global_norm(sums) * share, 1.0)  # of what is in memory
        return jax.tree.map(lambda g: g * share, sums), metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = state.rng[0] ^ state.step.astype(jnp.uint32)
        key = jnp.stack([own, state.rng[1], state.rng[2], jnp.uint32(0)]) if draws else None
        grads, metrics = gradients(state.params, state.frozen, batch, key)
        # A device updates the share of which it keeps the optimizer's state, and only then is it gathered again.
        params = jax.lax.with_sharding_constraint(state.params, update_shardings)
        with use_rules(rules):
            updates, opt_state = optimizer.update(grads, state.opt_state, params, norm=metrics["grad_norm"].total)
        if recipe.optimizer.name == "muon":  # the others make finite updates of finite gradients; a norm is a pass
            metrics["update_norm"] = Mean(optax.global_norm(updates), 1.0)
        metrics["learning_rate"] = Mean(jnp.float32(schedule(state.step)), 1.0)
        updated = jax.lax.with_sharding_constraint(optax.apply_updates(params, updates), update_shardings)
        guard = state.guard
        if faults.non_finite == "skip" or faults.spike_sigma is not None:
            values = jnp.stack([metrics["loss"].total / metrics["loss"].count, metrics["grad_norm"].total])
            bad = ~jnp.all(jnp.isfinite(values))
            if "update_norm" in metrics:
                bad |= ~jnp.isfinite(metrics["update_norm"].total)
            if faults.spike_sigma is not None:
                spike, guard = judge(guard, values, faults.spike_sigma)
                metrics["spike"] = Mean(spike.astype(jnp.float32), 1.0)
                bad |= spike
            updated = keep_where(bad, params, updated)
            opt_state = keep_where(bad, state.opt_state, opt_state)
        return TrainState(state.step + 1, updated, opt_state, state.rng, state.frozen, guard), metrics

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
        abstract_state=abstract_state,
        abstract_batch=abstract_batch,
        grad_shardings=grad_shardings,
        layer_order=layer_order,
        init=functools.partial(initial_state, recipe, abstract_state, draw, start, layer_order, graphdef),
        load_frozen=functools.partial(initial_frozen, recipe, abstract_state, draw, layer_order),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, rules.replicated),
            donate_argnums=(0,) if recipe.backend.donate else (),
        ),
        gradients=jax.jit(
            lambda params, frozen, batch: gradients(params, frozen, batch),
            in_shardings=(param_shardings, frozen_shardings, batch_sharding),
            out_shardings=(update_shardings, rules.replicated),
        ),
        eval_step=jax.jit(
            eval_step,
            in_shardings=(param_shardings, frozen_shardings, batch_sharding),
            out_shardings=rules.replicated,
        ),
    )
    with recipe.blamed("parallel"):
        program.train_step.trace(program.abstract_state, abstract_batch)  # a rule that cannot apply shows here
    return program


def _row_ids(rows: int) -> jax.Array:
    """Numbers of this device's rows, or parts of rows, that no other has; alike along `tensor`. i32[rows]"""
    place = jnp.int32(0)
    for axis in ("pipeline", "data", "fsdp", "expert", "context"):
        place = place * axis_size(axis) + axis_index(axis)
    return place * rows + jnp.arange(rows, dtype=jnp.int32)


def _accumulate(compute: Callable[[Batch], Any], batch: Batch, accumulation: int) -> Any:
    """The sum of what `compute` returns over `accumulation` microbatches, one after the other."""
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


def _microbatch_rows(recipe: Recipe, layout: Layout) -> int:
    """Rows on a device of one of the pipeline's microbatches."""
    microbatches, stages = recipe.parallel.pipeline_microbatches, layout.pipeline
    rows = recipe.train.global_batch_size // (layout.batch_shards * recipe.train.accumulation_steps)
    if microbatches is None:
        return 1
    if microbatches % stages or rows % (microbatches // stages):
        legal = [stages * n for n in range(1, rows + 1) if rows % n == 0]
        raise recipe.error(
            "parallel.pipeline_microbatches",
            f"expected a multiple of parallel.pipeline = {stages} that divides the rows of {stages} stages, "
            f"{rows * stages:,}: {', '.join(map(str, legal))}",
        )
    return rows * stages // microbatches


def _on_every_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` of each device's parts of its arguments."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _shardings(variables: Any, rules: Rules, of: Sharded) -> Any:
    """Nested dict of shardings, by the dim names each parameter carries."""
    flat = {
        path: rules.weight_sharding(".".join(map(str, path)), variable.shape, variable.get_metadata()["axes"], of)
        for path, variable in nnx.to_flat_state(variables)
    }
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def _device_kind(recipe: Recipe) -> str | None:
    """What the topology's devices are called; None of devices as they are found."""
    topology = recipe.hardware.load()
    return None if topology is None else topology.device_kinds[0]


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
    if layout.expert > 1 and model.moe is None:
        raise recipe.error("parallel.expert", "spreads experts, and the model has none (model.moe); use fsdp")
    if model.moe is not None and model.moe.num_experts % layout.expert:
        raise recipe.error(
            "model.moe.num_experts",
            f"does not divide over parallel.expert = {layout.expert}"
            f"{nearest_divisors(model.moe.num_experts, layout.expert)}",
        )
    if problem := dispatch_problem(model, backends.current()):
        raise recipe.error("model.moe.dispatch", problem)
    with backends.standing_for(_device_kind(recipe)):
        if problem := routing_problem(model, backends.current()):
            raise recipe.error("model.moe.experts_per_token", problem)
    tensor = layout.tensor
    if model.num_heads % tensor:
        raise recipe.error(
            "model.num_heads",
            f"does not divide over parallel.tensor = {tensor}{nearest_divisors(model.num_heads, tensor)}",
        )
    if max(model.num_kv_heads, tensor) % min(model.num_kv_heads, tensor):
        raise recipe.error(
            "model.num_kv_heads",
            f"must divide parallel.tensor = {tensor} or be a multiple of it; values of parallel.tensor that do: "
            + ", ".join(
                str(n)
                for n in range(1, model.num_heads + 1)
                if model.num_heads % n == 0 and max(model.num_kv_heads, n) % min(model.num_kv_heads, n) == 0
            ),
        )
    if model.vocab_size % tensor:
        raise recipe.error(
            "model.vocab_size",
            f"does not divide over parallel.tensor = {tensor}; {-(-model.vocab_size // tensor) * tensor:,} does, with "
            "rows that no token uses",
        )
    if problem := context_problem(recipe.data.sequence_length, layout.context, tensor):
        raise recipe.error("data.sequence_length", problem)
    chunks = recipe.parallel.interleave
    if problem := layers_problem(model.num_layers, layout.pipeline, chunks, len(model.layer_pattern)):
        raise recipe.error("model.num_layers", problem)
    if problem := layout.batch_problem(rows, recipe.train.accumulation_steps):
        raise recipe.error("train.global_batch_size", problem)
    return layout
