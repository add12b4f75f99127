"""A model for serving, as functions: chunks of prompts into slots, and a token for every slot."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.adapters import attach_places
from trainfw.data import Progress
from trainfw.errors import UserError, expect
from trainfw.models import (
    AdapterInputs,
    CacheDtype,
    Frozen,
    LayerKind,
    ModelConfig,
    ModelOptions,
    SlotCache,
    Slots,
    Transformer,
    abstract_unstacked,
    build_model,
    freeze,
    room_of,
    unstack,
)
from trainfw.parallel import Rules, all_gather
from trainfw.program.fit import Fit, fit
from trainfw.program.gradients import on_every_device
from trainfw.program.init_state import shardings_of
from trainfw.program.program import Function, Functions
from trainfw.quantization import Quantized
from trainfw.recipe import Recipe
from trainfw.sampling import DrawnTokens, Draws, draw_tokens
from trainfw.weights import Tree, kept_shardings, kept_weight, map_named, named

State = dict[str, Any]
"""`caches`, by kind of layer, and `tokens`, i32[slots]: the newest of each slot, which no cache holds yet."""


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
            expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        expect("adapters", self.adapters, self.adapters >= 0, "0 or more")


@dataclass(frozen=True, repr=False)
class Server:
    """A model on a set of devices, as the functions `prefill`, `decode` and `decode_filtered`.

    `prefill` (params, state, prompts) -> (state, drawn); the others (params, state, rows) -> (state, drawn), where
    `decode` leaves out what filters tokens, and with it the likeliest ones. The state is donated.
    """

    recipe: Recipe
    shape: ServerShape
    fit: Fit
    graphdef: nnx.GraphDef[Transformer]
    abstract_kept: Tree
    """ShapeDtypeStructs with shardings, as weights are kept, those of all layers as one."""
    abstract_params: Tree
    """Likewise, as the functions take them."""
    abstract_state: State
    functions: Functions

    def __repr__(self) -> str:
        return f"Server({self.recipe.name!r}, {self.fit.layout}, {self.shape}, functions: {', '.join(self.functions)})"

    @property
    def shards(self) -> int:
        """Groups of devices that have slots of their own; each prefills one prompt at a time."""
        return self.fit.layout.batch_shards

    @property
    def rooms(self) -> dict[str, int]:
        """Tokens of a slot by kind of layer."""
        config, shape = self.recipe.model, self.shape
        assert isinstance(config, ModelConfig)
        return {kind: room_of(config, kind, shape.length, shape.chunk) for kind in dict.fromkeys(config.layer_kinds)}

    def empty_state(self) -> State:
        """Return the state without any request."""
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
    if not isinstance(config, ModelConfig):
        raise recipe.error("model.family", f"{config.family!r}: no text can be drawn from its models")
    recipe = _of_slots(recipe, shape, len(devices))
    place = fit(recipe, devices, stands_in)
    if shape.slots % (shards := place.layout.batch_shards):
        raise UserError(f"slots = {shape.slots}: {place.layout} has {shards} groups of devices; expected a multiple")
    rules = Rules(place.mesh, recipe.parallel.rules, recipe.parallel.fsdp_shards, splits_sequence=False)
    place = replace(place, rules=rules)
    options = ModelOptions(compute_dtype=recipe.train.compute_dtype, scan_layers=recipe.train.scan_layers)

    def make() -> Any:
        model = build_model(config, options, nnx.Rngs(jax.random.key(0, impl="threefry2x32")))
        freeze(model)
        attach_places(model, shape.adapters, shape.rank)
        return model

    graphdef, variables = nnx.split(nnx.eval_shape(make), Frozen)
    kept = _params(recipe, rules, variables)
    params = kept if recipe.train.scan_layers else kept | {"layers": abstract_unstacked(kept["layers"])}
    state = _state(config, shape, rules, apart=not recipe.train.scan_layers)
    local = Local(place, graphdef, shape)
    prompts, rows = _prompts(config, shape, place), _rows(config, shape, place)
    filtered = rows | {"draws": _draws(config, shape.slots, place, filters=True)}
    functions = {
        "prefill": _function("prefill", local.prefill, place, (params, state, prompts), True),
        "decode": _function("decode", local.decode, place, (params, state, rows), False),
        "decode_filtered": _function("decode_filtered", local.decode, place, (params, state, filtered), True),
    }
    return Server(recipe, shape, place, graphdef, kept, params, state, functions)


def _of_slots(recipe: Recipe, shape: ServerShape, devices: int) -> Recipe:
    """Return the recipe as a batch of slots, which its layout is then judged by."""
    for axis in ("pipeline", "context"):
        if getattr(recipe.parallel, axis) != 1:
            raise recipe.error(f"parallel.{axis}", "serving splits no model over it; expected 1")
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


def _state(config: ModelConfig, shape: ServerShape, rules: Rules, *, apart: bool) -> State:
    """Describe the state; `apart`: each layer has arrays of its own."""
    heads = max(config.num_kv_heads, rules.mesh.shape["tensor"])  # where devices share a head, each has it
    dtype = jnp.dtype(shape.cache)

    def array(size: tuple[int, ...], dtype: Any, *names: str | None) -> jax.ShapeDtypeStruct:
        sharding = rules.sharding("cache", size, (*names, *[None] * (len(size) - len(names))))
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    caches = {}
    for kind in dict.fromkeys(config.layer_kinds):
        room = room_of(config, kind, shape.length, shape.chunk)
        lead, names = (config.layer_kinds.count(kind), shape.slots, heads), (None, "batch", "kv_heads")
        keys = array((*lead, config.head_dim, room), dtype, *names)
        values = array((*lead, room, config.head_dim), dtype, *names)
        scales = [array((*lead, room), jnp.float32, *names) for _ in range(2 if shape.cache == "int8" else 0)]
        caches[kind] = SlotCache(keys, values, *scales)  # type: ignore[arg-type]
    if apart:
        caches = abstract_unstacked(caches)
    return {"caches": caches, "tokens": array((shape.slots,), jnp.int32, "batch")}


def _row_array(place: Fit, size: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = place.rules.sharding("rows", size, ("batch", *[None] * (len(size) - 1)))
    return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)


def _draws(config: ModelConfig, rows: int, place: Fit, *, filters: bool) -> Draws:
    array = functools.partial(_row_array, place)
    filtering = (((rows,), jnp.int32), ((rows,), jnp.float32), ((rows, -(-config.vocab_size // 32)), jnp.uint32))
    always = ((rows,), jnp.float32), ((rows,), jnp.uint32), ((rows,), jnp.int32)
    return Draws(*(array(*one) for one in (*always, *(filtering if filters else ()))))  # type: ignore[arg-type]


def _rows(config: ModelConfig, shape: ServerShape, place: Fit) -> dict[str, Any]:
    """Describe the inputs of `decode`, a row for each slot."""
    numbers = _row_array(place, (shape.slots,), jnp.int32)
    rows = {
        "lengths": numbers,
        "ends": dict.fromkeys(config.layer_kinds, numbers),
        "active": numbers,
        "draws": _draws(config, shape.slots, place, filters=False),
    }
    return rows | ({"adapters": numbers} if shape.adapters else {})


def _prompts(config: ModelConfig, shape: ServerShape, place: Fit) -> dict[str, Any]:
    """Describe the inputs of `prefill`, a row for each group of devices: a chunk of one of its slots' prompts."""
    count = place.layout.batch_shards
    numbers = _row_array(place, (count,), jnp.int32)
    rows = {
        "tokens": _row_array(place, (count, shape.chunk), jnp.int32),
        "slots": numbers,
        "lengths": numbers,
        "ends": dict.fromkeys(config.layer_kinds, numbers),
        "counts": numbers,
        "last": numbers,
        "draws": _draws(config, count, place, filters=True),
    }
    return rows | ({"adapters": numbers} if shape.adapters else {})


def _function(
    name: str, local: Callable[..., tuple[State, DrawnTokens]], place: Fit, arguments: tuple[Any, ...], filters: bool
) -> Function:
    row = place.rules.sharding("rows", (place.layout.batch_shards,), ("batch",))
    drawn = DrawnTokens(row, row, *([row, row] if filters else []))  # type: ignore[arg-type]
    out = shardings_of(arguments[1]), drawn
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
    mapped = on_every_device(local, place.mesh, specs, jax.tree.map(lambda sharding: sharding.spec, out))

    def function(params: Tree, state: State, rows: Mapping[str, Any]) -> tuple[State, DrawnTokens]:
        return mapped(params, state, rows)

    function.__name__ = name
    jitted = jax.jit(function, in_shardings=shardings_of(arguments), out_shardings=out, donate_argnums=1)
    return Function(name, jitted, arguments)


@dataclass(frozen=True)
class Local:
    """The functions on one device: its slots, and its part of every weight."""

    fit: Fit
    graphdef: nnx.GraphDef[Transformer]
    shape: ServerShape

    def prefill(self, params: Tree, state: State, prompts: Mapping[str, Any]) -> tuple[State, DrawnTokens]:
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

    def decode(self, params: Tree, state: State, rows: Mapping[str, Any]) -> tuple[State, DrawnTokens]:
        """Add each slot's newest token to it, and draw the next; slots that are not `active` stay as they are."""
        tokens, active = state["tokens"], rows["active"] > 0
        with self.fit.tracing():
            slots = Slots(state["caches"], rows["lengths"], rows["ends"])
            x_BSD, caches = self._extended(params, tokens[:, None], slots, ~active, rows)
            drawn = draw_tokens(self._logits(params, x_BSD), rows["draws"])
        return {"caches": caches, "tokens": jnp.where(active, drawn.token_B, tokens)}, drawn

    def _model(self, params: Tree) -> Transformer:
        return nnx.merge(self.graphdef, nnx.State(params))

    def _extended(
        self, params: Tree, tokens_BS: jax.Array, slots: Slots, keep_B: jax.Array, rows: Mapping[str, Any]
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
    recipe, total = server.recipe, len(named(server.abstract_kept))
    numbers = itertools.count(1)

    def place(name: str, like: Any) -> Any:
        wide = like.codes if isinstance(like, Quantized) else like
        wide = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=wide.sharding)
        apart = name.startswith("layers.") and not recipe.train.scan_layers
        out = shardings_of(abstract_unstacked(like) if apart else like)
        if progress is not None:
            progress("reading weights, arrays", next(numbers), total)

        def keep(weight: jax.Array) -> Any:
            kept = kept_at(name, weight, recipe)
            return unstack(kept) if apart else kept

        if ".adapter." not in name:
            return jax.jit(keep, out_shardings=out)(read(name, wide))
        empty = jnp.ones if name.endswith(".factor") else jnp.zeros
        return jax.jit(lambda: keep(empty(wide.shape)), out_shardings=out)()

    return map_named(place, server.abstract_kept)
