from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from trainfw import objectives, optim
from trainfw.models import Frozen, image_config
from trainfw.pieces import is_own, name_of, options_of, running
from trainfw.program.denoise import DENOISED, Inputs, LocalDenoising
from trainfw.program.fit import Fit, fit
from trainfw.program.gradients import LocalComputation, on_every_device
from trainfw.program.init_state import initial_frozen, initial_state, shardings_of
from trainfw.program.models import ModelSet, model_set
from trainfw.program.program import Function, Functions, Program
from trainfw.program.skip_bad_steps import start_guard
from trainfw.program.state import TrainState
from trainfw.program.update import Update
from trainfw.recipe import Recipe, expect_recipe, rates_of

_RATES = ("learning_rate", "schedule", "warmup_steps", "decay_steps", "final_fraction", "clip_norm", "ema")
"""Keys of `optimizer` that hold whatever the optimizer is."""


def build_program(
    recipe: Recipe,
    devices: Sequence[jax.Device] | None = None,
    *,
    objective: objectives.Objective | None = None,
    optimizer: optim.OwnOptimizer | None = None,
    stands_in: bool | None = None,
) -> Program:
    """Turn a recipe and devices (default: all) into the program. Compiles and allocates nothing.

    Args:
        objective: one of your own, in the place of the recipe's; the program's recipe names it.
        optimizer: likewise: a function of the learning rate that returns an Optax transformation.
        stands_in: whether a CPU stands for other hardware, where the CPU's own kernels are not what that would run.
            None: where `hardware.topology` is of other hardware, or the backend is simulated.

    Raises UserError where the recipe and the devices do not fit together.
    """
    recipe = name_pieces(expect_recipe(recipe), objective, optimizer)
    place = fit(recipe, jax.devices() if devices is None else devices, stands_in)
    with recipe.blamed("optimizer"):
        traits = _scaled(optim.traits_of(recipe.optimizer, optimizer), recipe)
    if recipe.adapter is not None and traits.kernels_alone:
        raise recipe.error(
            "optimizer.name", "updates whole kernels, of which an adapter trains none; use adamw or lion"
        )
    objective = objective_of(recipe) if objective is None else objective
    schema = _schema(recipe, objective)
    models = model_set(recipe, place, objective.roles)
    transformation, schedule = _optimizer(recipe, optimizer)
    with recipe.blamed("parallel"):
        grad_shardings = models.shardings(place.rules, "gradients")
        update_shardings = models.shardings(place.rules, "optimizer")
    abstract_state, draw, start = _state(recipe, place, models, transformation, update_shardings)
    abstract_batch = {}
    for name, field in schema.fields.items():
        shape, dims = schema.shape(name), [dim if dim in ("batch", "sequence") else None for dim in field.dims]
        sharding = place.rules.sharding("batch", shape, tuple(dims))
        abstract_batch[name] = jax.ShapeDtypeStruct(shape, field.dtype, sharding=sharding)
    local = LocalComputation(recipe, place, models, objective)
    functions_of_images: Functions = {}
    if hasattr(objective, "schedule"):
        of_state = abstract_state.params, abstract_state.frozen
        functions_of_images = {"denoise": _denoise(place, models, of_state, abstract_batch)}
    gradient_sums, metrics = _on_mesh(local, abstract_state, abstract_batch, grad_shardings, update_shardings)
    update = Update(
        recipe=recipe,
        rules=place.rules,
        optimizer=transformation,
        traits=traits,
        schedule=schedule,
        shardings=update_shardings,
        gradient_sums=gradient_sums,
        wholes=_wholes(place),
        draws=recipe.adapter is not None and recipe.adapter.dropout > 0,
    )
    program = Program(
        recipe=recipe,
        objective=objective,
        schema=schema,
        fit=place,
        models=models,
        traits=traits,
        abstract_state=abstract_state,
        abstract_batch=abstract_batch,
        grad_shardings=grad_shardings,
        init=functools.partial(initial_state, models, abstract_state, draw, start),
        load_frozen=functools.partial(initial_frozen, models, abstract_state, draw),
        functions=_functions(update, metrics, abstract_state, abstract_batch) | functions_of_images,
        gradients=jax.jit(
            lambda params, frozen, batch: update.gradients(params, frozen, batch),
            in_shardings=shardings_of((abstract_state.params, abstract_state.frozen, abstract_batch)),
            out_shardings=(update_shardings, place.rules.replicated),
        ),
    )
    with recipe.blamed("parallel"):
        program.functions["train"].trace()  # a rule that cannot apply shows here
    return program


def _optimizer(
    recipe: Recipe, own: optim.OwnOptimizer | None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Return the recipe's optimizer, or a script's own, and its learning rate by step, through all stages."""
    config, steps, rates = recipe.optimizer, recipe.train.steps, rates_of(recipe)
    with recipe.blamed("optimizer"):
        transformation = optim.make_optimizer(config, steps, own, rates, recipe.model.update_scales)
        return transformation, optim.make_schedule(config, steps, rates=rates)


def _scaled(traits: optim.Traits, recipe: Recipe) -> optim.Traits:
    """Return traits whose largest update is that of the largest factor on updates."""
    most, largest = max((recipe.model.update_scales or {}).values(), default=1.0), traits.largest_update
    if most <= 1:
        return traits
    return replace(traits, largest_update=lambda config, step, size: most * largest(config, step, size))


def name_pieces(recipe: Recipe, objective: objectives.Objective | None, optimizer: optim.OwnOptimizer | None) -> Recipe:
    """Return a recipe that names the pieces which a script hands over, with the values that they were made with.

    So what a run records is true, and another piece is seen when it goes on. Raises UserError where one is none.
    """
    changed: dict[str, Any] = {}
    if objective is not None:
        with recipe.blamed("objective"):
            objectives.check_objective(objective, name_of(objective))
        changed["objective"] = objectives.ObjectiveConfig(name=name_of(objective), options=options_of(objective))
    if optimizer is not None:
        kept = {key: getattr(recipe.optimizer, key) for key in _RATES}
        changed["optimizer"] = optim.OptimizerConfig(name=name_of(optimizer), options=options_of(optimizer), **kept)
    return recipe.model_copy(update=changed) if changed else recipe


def objective_of(recipe: Recipe) -> objectives.Objective:
    """Return what a recipe's model learns. Raises UserError where somebody's own objective cannot be made."""
    with recipe.blamed("objective"):
        return objectives.make_objective(
            recipe.objective,
            chunk=recipe.train.loss_chunk,
            mask_documents=recipe.data.mask_documents,
            z_loss=recipe.train.z_loss,
            pairs_per_row=recipe.data.pairs_per_row,
            image=_image_shape(recipe),
        )


def _image_shape(recipe: Recipe) -> objectives.ImageShape | None:
    if not recipe.reads_images:
        return None
    model: Any = image_config(recipe.model)
    names = ("conditioning", "caption_length", "caption_size", "latent_channels")
    given = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return objectives.ImageShape(model.image_size, model.channels, recipe.sequence_length, **given)


def _schema(recipe: Recipe, objective: objectives.Objective) -> objectives.Schema:
    """Return the arrays of a batch. Raises UserError where somebody's own objective reads others than there are."""
    name, sizes = recipe.objective.name, (recipe.train.global_batch_size, recipe.sequence_length)
    if not is_own(name):
        return objective.schema(*sizes)
    with recipe.blamed("objective"):
        with running("name", name, "schema"):
            schema = objective.schema(*sizes)
        image, draws = _image_shape(recipe), hasattr(objective, "drawn")
        objectives.check_schema(schema, name, *sizes, recipe.group, image=image, draws=draws)
    return schema


def _state(
    recipe: Recipe, place: Fit, models: ModelSet, optimizer: Any, update_shardings: Any
) -> tuple[TrainState, Any, Any]:
    """Return (the abstract state, what draws the parameters and what is frozen, what makes the first state of them)."""
    rules, faults, seed = place.rules, recipe.faults, recipe.train.seed
    draw = jax.jit(models.draw)  # this and `start`, so that they are traced once: for the shapes here, and to run

    @jax.jit
    def start(params: Any, frozen: Any) -> TrainState:
        step_key = jax.random.key(seed, impl="rbg")  # the one generator whose draws Neuron's compiler takes
        guard = {} if faults.spike_sigma is None else start_guard()
        return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(step_key), frozen, guard)

    with recipe.blamed("parallel"):
        param_shardings = models.shardings(rules, "parameters")
    frozen_shardings = models.frozen_shardings(rules)
    with recipe.blamed("optimizer"):
        shapes = jax.eval_shape(lambda: start(*draw()))
    shardings = TrainState(
        step=rules.replicated,
        params=param_shardings,
        opt_state=optim.optimizer_shardings(optimizer, shapes.params, update_shardings, rules.replicated),
        rng=rules.replicated,
        frozen=frozen_shardings,
        guard=jax.tree.map(lambda _: rules.replicated, shapes.guard),
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return abstract, draw, start


def _wholes(place: Fit) -> bool:
    """Tell whether parameters are whole on every device, and gradients are not."""
    return place.rules.fsdp_shards == "gradients" and place.mesh.size > 1


def _on_mesh(
    local: LocalComputation, state: TrainState, batch: objectives.Batch, gradients: Any, updates: Any
) -> tuple[Callable[..., tuple[Any, objectives.Metrics]], Callable[..., objectives.Metrics]]:
    """Return the gradients' sums and the metrics of all devices; of the former, and of updates, these are shardings."""
    trees = *map(shardings_of, (state.params, state.frozen, batch)), gradients, updates
    specs, frozen_specs, batch_specs, grad_specs, update_specs = (
        jax.tree.map(lambda sharding: sharding.spec, tree) for tree in trees
    )
    mesh, wholes = local.fit.mesh, _wholes(local.fit)
    sums = on_every_device(
        local.gradients,
        mesh,
        (grad_specs if wholes else specs, specs if wholes else None, frozen_specs, batch_specs, P()),
        (update_specs, P()),
    )
    return sums, on_every_device(local.metrics, mesh, (specs, frozen_specs, batch_specs), P())


def denoise_by_rows(program: Program, model: nnx.Module) -> tuple[Function, Any, Any]:
    """Return `denoise` with a model of the program's shape that has a bank of adapters, and what it takes first:
    what would learn, and what would not. The program is of one device.
    """
    graphdef, *parts = nnx.split(model, nnx.Param, Frozen)
    params, base = jax.device_put(tuple(map(nnx.to_pure_dict, parts)), program.fit.rules.replicated)
    frozen = {"base": base}
    of_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, frozen))
    weight = program.abstract_batch["weight"]
    rows = jax.ShapeDtypeStruct(weight.shape, jnp.int32, sharding=weight.sharding)
    models = replace(program.models, graphdef=graphdef)
    return _denoise(program.fit, models, of_state, program.abstract_batch, adapter=rows), params, frozen


def _denoise(
    place: Fit, models: ModelSet, of_state: tuple[Any, Any], batch: objectives.Batch, **more: jax.ShapeDtypeStruct
) -> Function:
    """Return the function `denoise` of a batch's images, of which each device computes its rows."""
    inputs = {name: batch[name] for name in DENOISED if name in batch}
    if len(inputs) > 2:  # there is a condition
        inputs["guidance"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=place.rules.replicated)
    arguments = *of_state, inputs | more
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
    predicted = on_every_device(LocalDenoising(place, models), place.mesh, specs, inputs["image"].sharding.spec)

    def denoise(params: object, frozen: object, inputs: Inputs) -> jax.Array:
        return predicted(params, frozen, inputs)

    jitted = jax.jit(denoise, in_shardings=shardings_of(arguments), out_shardings=inputs["image"].sharding)
    return Function("denoise", jitted, arguments)


def _functions(
    update: Update, metrics: Callable[..., objectives.Metrics], state: TrainState, batch: objectives.Batch
) -> Functions:
    replicated = update.rules.replicated

    def train_step(state: TrainState, batch: objectives.Batch) -> tuple[TrainState, objectives.Metrics]:
        return update.train_step(state, batch)

    def eval_step(params: Any, frozen: Any, batch: objectives.Batch) -> objectives.Metrics:
        return metrics(params, frozen, batch)

    evaluated = (state.params, state.frozen, batch)
    train = jax.jit(
        train_step,
        in_shardings=shardings_of((state, batch)),
        out_shardings=(shardings_of(state), replicated),
        donate_argnums=(0,) if update.recipe.backend.donate else (),
    )
    evaluate = jax.jit(eval_step, in_shardings=shardings_of(evaluated), out_shardings=replicated)
    return {
        "train": Function("train", train, (state, batch)),
        "evaluate": Function("evaluate", evaluate, evaluated),
    }
