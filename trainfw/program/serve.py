"""A model for serving, as functions: chunks of prompts into slots, and a token for every slot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from trainfw import backends
from trainfw.adapters import attach_places
from trainfw.data import Progress
from trainfw.errors import UserError, expect
from trainfw.models import (
    AdapterInputs,
    CacheDtype,
    Frozen,
    LayerKind,
    ModelOptions,
    SlotCache,
    SlotModel,
    Slots,
    abstract_unstacked,
    build_model,
    family_of,
    freeze,
    vocabulary_of,
)
from trainfw.parallel import Layout, Rules, all_gather
from trainfw.program.fit import Fit, fit
from trainfw.program.gradients import on_every_device
from trainfw.program.init_state import shardings_of
from trainfw.program.program import Function, Functions
from trainfw.program.server_weights import Forms, choose_forms
from trainfw.quantization import Quantized
from trainfw.recipe import Recipe
from trainfw.sampling import DrawnTokens, Draws, draw_tokens
from trainfw.weights import Tree, kept_shardings, kept_weight, map_named, named

State = dict[str, Any]
"""`caches`, by kind of layer, and `tokens`, i32[slots]: the newest of each slot, which no cache holds yet."""


Caches = dict[LayerKind, SlotCache]
Rows = dict[str, Any]
"""Arrays of one call by name, a row for each slot or prompt."""


@dataclass(frozen=True)
class ServerShape:
    """Static sizes of a server."""

    slots: int
    """Requests that are answered at once."""
    length: int
    """Tokens of prompt and answer that a slot holds."""
    chunk: int = 128
    """Tokens of a prompt that `prefill` takes at once."""
    cache: CacheDtype = "bfloat16"
    adapters: int = 0
    """Places for adapters, besides none."""
    rank: int = 16
    """The largest of an adapter."""

    def __post_init__(self) -> None:
        for name in ("slots", "length", "chunk", "rank"):
            value = getattr(self, name)
            expect(name, value, isinstance(value, Integral) and int(value) >= 1, "a whole number, at least 1")
        expect("adapters", self.adapters, self.adapters >= 0, "0 or more")


@dataclass(frozen=True, repr=False)
class Server:
    """A model on a set of devices, as the functions `prefill`, `decode` and `decode_sampled`.

    `prefill` (params, state, prompts) -> (state, drawn); the others (params, state, rows) -> (state, drawn), of which
    `decode` takes every slot's likeliest token and `decode_sampled` draws by each one's settings. The state is donated.
    """

    recipe: Recipe
    shape: ServerShape
    fit: Fit
    graphdef: nnx.GraphDef[SlotModel]
    abstract_kept: Tree
    """ShapeDtypeStructs with shardings, as weights are kept, those of all layers as one."""
    abstract_params: Tree
    """Likewise, as the functions take them."""
    forms: Forms
    abstract_state: State
    rooms: dict[LayerKind, int]
    """Tokens of a slot by kind of layer."""
    functions: Functions
    _compiled: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Server({self.recipe.name!r}, {self.fit.layout}, {self.shape}, functions: {', '.join(self.functions)})"

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.fit.mesh

    @property
    def shards(self) -> int:
        """Groups of devices that have slots of their own; each prefills one prompt at a time."""
        return self.fit.layout.batch_shards

    def compiled(self, name: str) -> Callable[..., tuple[State, DrawnTokens]]:
        """Return a function compiled, the first time that it is asked for."""
        if name not in self._compiled:
            self._compiled[name] = self.functions[name].compile()
        return self._compiled[name]

    def empty_state(self) -> State:
        """Return the state without any request. Raises UserError where a host's memory has no room for it."""
        size, free = (
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract_state)),
            backends.free_memory(),
        )
        if backends.is_host(self.mesh.devices.flat[0]) and 0 < free < size:
            shape = self.shape
            raise UserError(
                f"slots = {shape.slots}, length = {shape.length:,}: their keys and values take {size / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB of memory are free; take fewer slots or a shorter length"
            )
        make = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.abstract_state),
            out_shardings=shardings_of(self.abstract_state),
        )
        state: State = make()
        return state


def build_server(
    recipe: Recipe, shape: ServerShape, devices: Sequence[jax.Device] | None = None, *, stands_in: bool | None = None
) -> Server:
    """Turn a recipe's model and layout, and devices (default: all), into a server. Compiles and allocates nothing.

    Weights are kept as `adapter.base` says, or else in `train.compute_dtype`, in which products are computed. Layers
    are arrays of their own where `train.scan_layers` is false.

    Raises UserError where they do not fit together.
    """
    config, devices = recipe.model, jax.devices() if devices is None else devices
    if not family_of(config).decodes:
        raise recipe.error("model.family", f"{config.family!r}: no text can be drawn from its models")
    recipe = _of_slots(recipe, shape, len(devices))
    place = fit(recipe, devices, stands_in)
    options = ModelOptions(compute_dtype=recipe.train.compute_dtype, scan_layers=recipe.train.scan_layers)

    def make() -> SlotModel:
        model = build_model(config, options, nnx.Rngs(jax.random.key(0, impl="threefry2x32")))
        freeze(model)
        attach_places(model, shape.adapters, shape.rank)
        return model

    model = nnx.eval_shape(make)
    variables = nnx.state(model, Frozen)
    kept = _params(recipe, _rules(recipe, place), variables)
    return server_on(place, recipe, shape, model, kept, few_rows=place.mesh.size == 1)


def _rules(recipe: Recipe, place: Fit) -> Rules:
    return Rules(place.mesh, recipe.parallel.rules, recipe.parallel.fsdp_shards, splits_sequence=False)


def server_on(place: Fit, recipe: Recipe, shape: ServerShape, model: Any, kept: Tree, *, few_rows: bool) -> Server:
    """Return the server of a model without arrays, at its place.

    Args:
        kept: descriptions of its weights with shardings, ShapeDtypeStructs.
        few_rows: they may be put in the forms that products of few rows read fastest: those of one device.
    """
    nnx.update(model, nnx.State(kept))
    place = replace(place, rules=_rules(recipe, place))
    with place.tracing():
        forms = choose_forms(model, shape.slots) if few_rows else Forms(not recipe.train.scan_layers)
    by_name = dict(named(kept))
    graphdef, params = nnx.graphdef(model), map_named(lambda name, _: forms.described(name, by_name), kept)
    caches = model.abstract_caches(
        shape.cache, slots=shape.slots, length=shape.length, chunk=shape.chunk, tensor=place.layout.tensor
    )
    state = _state(caches, shape, place.rules, apart=forms.apart)
    inputs = Inputs(vocabulary_of(recipe.model), tuple(caches), shape, place)
    local, before = Local(place, graphdef, shape), (params, state)
    functions = {
        name: inputs.function(name, run, (*before, rows), forms.compiler_options)
        for name, run, rows in (
            ("prefill", local.prefill, inputs.prompts()),
            ("decode", local.decode, inputs.rows(draws=False)),
            ("decode_sampled", local.decode, inputs.rows(draws=True)),
        )
    }
    rooms = {kind: cache.room for kind, cache in caches.items()}
    return Server(recipe, shape, place, graphdef, kept, params, forms, state, rooms, functions)


def _of_slots(recipe: Recipe, shape: ServerShape, devices: int) -> Recipe:
    """Return the recipe as a batch of slots, which its layout is then judged by."""
    for axis in ("pipeline", "context"):
        if getattr(recipe.parallel, axis) != 1:
            raise recipe.error(f"parallel.{axis}", "serving splits no model over it; expected 1")
    with recipe.blamed("parallel"):
        layout = Layout.resolve(recipe.parallel, devices, simulate=recipe.hardware.topology is None)
    if shape.slots % (groups := layout.batch_shards):
        near = f"{shape.slots // groups * groups or groups} or {-(-shape.slots // groups) * groups}"
        raise UserError(f"slots = {shape.slots}: do not divide over {layout.batch_product} = {groups}; {near} do")
    train = recipe.train.model_copy(update={"global_batch_size": shape.slots, "accumulation_steps": 1})
    return recipe.model_copy(update={"train": train})


def _params(recipe: Recipe, rules: Rules, variables: nnx.State) -> Tree:
    shardings = kept_shardings(variables, recipe, rules)
    with recipe.blamed("adapter"):
        kept = jax.eval_shape(
            lambda tree: map_named(lambda n, x: kept_at(n, x, recipe), tree), nnx.to_pure_dict(variables)
        )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), kept, shardings)


def kept_at(name: str, weight: jax.Array, recipe: Recipe) -> jax.Array | Quantized:
    """Convert a server's weight, f32, to its storage; those of adapters stay in the dtype of products."""
    if ".adapter." in name:
        return weight.astype(recipe.train.compute_dtype)
    return kept_weight(name, weight, recipe)


def _state(caches: Caches, shape: ServerShape, rules: Rules, *, apart: bool) -> State:
    """Add shardings to the description of caches; `apart`: each layer has arrays of its own."""

    def array(x: jax.ShapeDtypeStruct, *names: str | None) -> jax.ShapeDtypeStruct:
        sharding = rules.sharding("cache", x.shape, (*names, *[None] * (len(x.shape) - len(names))))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placed = jax.tree.map(lambda x: array(x, None, "batch", "kv_heads"), caches)
    tokens = array(jax.ShapeDtypeStruct((shape.slots,), jnp.int32), "batch")
    return {"caches": abstract_unstacked(placed) if apart else placed, "tokens": tokens}


@dataclass(frozen=True)
class Inputs:
    """Descriptions of what the functions take besides weights and state."""

    vocabulary: int
    kinds: tuple[LayerKind, ...]
    shape: ServerShape
    fit: Fit

    def _array(self, dtype: DTypeLike, *size: int) -> jax.ShapeDtypeStruct:
        sharding = self.fit.rules.sharding("rows", size, ("batch", *[None] * (len(size) - 1)))
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    def _of_rows(self, count: int, *, draws: bool, **more: jax.ShapeDtypeStruct) -> Rows:
        numbers, floats = self._array(jnp.int32, count), self._array(jnp.float32, count)
        rows: Rows = {"lengths": numbers, "ends": dict.fromkeys(self.kinds, numbers), **more}
        if self.shape.adapters:
            rows["adapters"] = numbers
        if draws:
            words = self._array(jnp.uint32, count, -(-self.vocabulary // 32))
            of_each = (floats, self._array(jnp.uint32, count), numbers, numbers, floats, words)
            rows["draws"] = Draws(*of_each)  # type: ignore[arg-type]
        return rows

    def rows(self, *, draws: bool) -> Rows:
        """Describe the inputs of `decode`, or of `decode_sampled` with settings of draws: a row for each slot."""
        return self._of_rows(self.shape.slots, draws=draws, active=self._array(jnp.int32, self.shape.slots))

    def prompts(self) -> Rows:
        """Describe the inputs of `prefill`, a row for each group of devices: a chunk of one of its slots' prompts."""
        count = self.fit.layout.batch_shards
        numbers = dict.fromkeys(("slots", "counts", "last"), self._array(jnp.int32, count))
        return self._of_rows(count, draws=True, tokens=self._array(jnp.int32, count, self.shape.chunk), **numbers)

    def function(
        self,
        name: str,
        local: Callable[..., tuple[State, DrawnTokens]],
        arguments: tuple[Tree, State, Rows],
        options: Mapping[str, str],
    ) -> Function:
        """Return a function of all devices, of what each computes; `options` are the compiler's, besides."""
        row = self._array(jnp.int32, self.fit.layout.batch_shards).sharding
        drawn = DrawnTokens(*([row] * (4 if "draws" in arguments[2] else 2)))
        out = shardings_of(arguments[1]), drawn
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
        mapped = on_every_device(local, self.fit.mesh, specs, jax.tree.map(lambda sharding: sharding.spec, out))

        def function(params: Tree, state: State, rows: Rows) -> tuple[State, DrawnTokens]:
            return mapped(params, state, rows)

        function.__name__ = name
        jitted = jax.jit(function, in_shardings=shardings_of(arguments), out_shardings=out, donate_argnums=1)
        return Function(name, jitted, arguments, options)


@dataclass(frozen=True)
class Local:
    """The functions on one device: its slots, and its part of every weight."""

    fit: Fit
    graphdef: nnx.GraphDef[SlotModel]
    shape: ServerShape

    def prefill(self, params: Tree, state: State, prompts: Rows) -> tuple[State, DrawnTokens]:
        """Add a chunk of a prompt to one of this device's slots; where it is the last, draw the answer's first token.

        A row of `prompts`: `tokens`, of which the first `counts` are meant (0: nothing is done), continue slot `slots`,
        which holds `lengths`, a multiple of the chunk.
        """
        slot, count = prompts["slots"][0], prompts["counts"][0]
        with self.fit.tracing():
            slots = Slots(state["caches"], prompts["lengths"], prompts["ends"], slot)
            x_BSD, caches = self._extended(params, prompts["tokens"], slots, prompts["counts"] < 1, prompts)
            newest = jax.lax.dynamic_slice_in_dim(x_BSD[0], jnp.maximum(count - 1, 0), 1, 0)[None]
            drawn = draw_tokens(self._logits(params, newest), prompts["draws"])
        tokens, places = state["tokens"], jnp.arange(state["tokens"].shape[0])
        mine = (places == slot) & (prompts["last"][0] > 0) & (count > 0)
        return {"caches": caches, "tokens": jnp.where(mine, drawn.token_B[0], tokens)}, drawn

    def decode(self, params: Tree, state: State, rows: Rows) -> tuple[State, DrawnTokens]:
        """Add each slot's newest token to it, and draw the next; slots that are not `active` stay as they are."""
        tokens, active = state["tokens"], rows["active"] > 0
        with self.fit.tracing():
            slots = Slots(state["caches"], rows["lengths"], rows["ends"])
            x_BSD, caches = self._extended(params, tokens[:, None], slots, ~active, rows)
            drawn = draw_tokens(self._logits(params, x_BSD), rows.get("draws"))
        return {"caches": caches, "tokens": jnp.where(active, drawn.token_B, tokens)}, drawn

    def _model(self, params: Tree) -> SlotModel:
        return nnx.merge(self.graphdef, nnx.State(params))

    def _extended(
        self, params: Tree, tokens_BS: jax.Array, slots: Slots, keep_B: jax.Array, rows: Rows
    ) -> tuple[jax.Array, dict[LayerKind, SlotCache]]:
        adapters = AdapterInputs(rows_B=rows["adapters"]) if "adapters" in rows else None
        return self._model(params).extend_slots(tokens_BS, slots, keep_B, self.shape.cache, adapters)

    def _logits(self, params: Tree, x_BSD: jax.Array) -> jax.Array:
        return all_gather(self._model(params).logits(x_BSD)[:, 0], "tensor", 1)


def place_weights(
    server: Server, read: Callable[[str, jax.ShapeDtypeStruct], jax.Array], progress: Progress | None = None
) -> Tree:
    """Return the weights as the server keeps them: no more than one array is ever there in another form.

    Args:
        read: (dotted name, f32 shape and sharding) -> the array, of all layers. Of adapters' places, which begin empty,
            it is not asked.
    """
    recipe, forms, kept = server.recipe, server.forms, dict(named(server.abstract_kept))
    numbers = itertools.count(1)

    def whole(name: str) -> jax.Array:
        like = kept[name]
        sharding = jax.tree.leaves(like)[0].sharding
        return read(name, jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=sharding))

    def place(name: str, like: Tree) -> Tree:
        if progress is not None:
            progress("reading weights, arrays", next(numbers), len(kept))
        sources, out = forms.sources(name), shardings_of(forms.described(name, kept))

        def form(*weights: jax.Array) -> Tree:
            return forms.formed(name, *(kept_at(*one, recipe) for one in zip(sources, weights, strict=True)))

        if ".adapter." not in name:
            return jax.jit(form, out_shardings=out)(*map(whole, sources))
        empty = jnp.ones if name.endswith(".factor") else jnp.zeros
        return jax.jit(lambda: form(empty(like.shape)), out_shardings=out)()

    return map_named(place, server.abstract_kept)
