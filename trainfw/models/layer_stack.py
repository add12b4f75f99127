"""A stack of like layers whose parameters are stored as one array each, with a leading layers dim.

Scanned or unrolled is a choice of program, never of storage: the same checkpoint serves both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend.core.primitives import all_gather_p

from trainfw import parallel
from trainfw.backends import ATTENDED, ROTATED
from trainfw.errors import UserError, did_you_mean
from trainfw.models.common.adapter_inputs import AdapterInputs, use_inputs
from trainfw.models.common.layers import PRODUCT, Linear, gather_weights
from trainfw.models.family import FamilyConfig, ModelOptions, Remat

M = TypeVar("M", bound=nnx.Module)

REDUCED = "reduced over tensor"
"""Name of what attention and feed-forward add to the residual stream."""
INPUT = "a layer's input"


def gather_sequence(x_BSD: jax.Array) -> jax.Array:
    """Return the whole sequence of which each device along `tensor` has a part: before a layer's own products."""
    return parallel.gather_sequence(x_BSD)


def scatter_sequence(y_BSD: jax.Array) -> jax.Array:
    """Return the sum of what devices along `tensor` have computed, to each its part of the sequence: after them."""
    return checkpoint_name(parallel.scatter_sequence(y_BSD), REDUCED)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: everything is kept but gathered weights."""
    if primitive is all_gather_p:
        return params["axis_name"] == ("tensor",)  # of activations
    return params.get("name") != parallel.GATHERED


def _kernel_results(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: what an attention kernel of jax's own returns, which has no names inside."""
    return bool(primitive.name.startswith("dot_product_attention_fwd"))


_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": _all_but_gathered,
    "full": None,  # saves a layer's input only
    "stage": None,  # and where layers are in stages, a stage's only
    # And what its projections return, so that no product with weights is done again, nor an attention kernel run.
    "dots": _policies.save_from_both_policies(
        _policies.save_only_these_names(PRODUCT, REDUCED, ROTATED, ATTENDED), _kernel_results
    ),
}


class Unstacked(NamedTuple):
    """Parts of a stacked array, one for each layer: their gradients need not be stacked."""

    parts: tuple[jax.Array, ...]


def unstack(stacked: Any) -> Any:
    """`Unstacked` for every array of a stack's, for layers that are not scanned."""

    def of(x: jax.Array) -> Unstacked:
        # lax.split, not slices: its transpose is one concatenation, where every slice would pad a whole gradient.
        return Unstacked(tuple(part.reshape(part.shape[1:]) for part in jax.lax.split(x, (1,) * x.shape[0])))

    return jax.tree.map(of, stacked)


def abstract_unstacked(stacked: Any) -> Any:
    """`unstack` for ShapeDtypeStructs with shardings that split no layers."""

    def of(x: jax.ShapeDtypeStruct) -> Unstacked:
        sharding = x.sharding.update(spec=jax.sharding.PartitionSpec(*x.sharding.spec[1:]))
        return Unstacked((jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding),) * x.shape[0])

    return jax.tree.map(of, stacked)


def restack(unstacked: Any) -> Any:
    """The opposite of `unstack`."""
    return jax.tree.map(lambda x: jnp.stack(x.parts), unstacked, is_leaf=is_unstacked)


def stack_size(stacked: Any) -> int:
    """Layers in a stack whose leaves are arrays or `Unstacked`."""
    first = jax.tree.leaves(stacked, is_leaf=is_unstacked)[0]
    return len(first.parts) if isinstance(first, Unstacked) else int(first.shape[0])


def is_unstacked(x: Any) -> bool:
    """Tell whether a leaf is an `Unstacked`, which jax.tree takes for a node."""
    return isinstance(x, Unstacked)


def init_stack(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs, *, fp8: bool = False) -> M:
    """`num_layers` layers made with keys of their own, as one module whose parameters are stacked.

    `fp8`: their linear maps multiply in 8 bits.
    """

    def make_one(rngs: nnx.Rngs) -> M:
        layer = make(rngs)
        for _, part in nnx.iter_modules(layer) if fp8 else ():
            if isinstance(part, Linear) and not part.kernel.get_metadata().get("wide"):  # as a router's is
                part.fp8 = True
        return layer

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_one(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), num_layers)
    stacked = jax.vmap(lambda key: nnx.state(make_one(nnx.Rngs(params=key))))(keys)
    for _, param in nnx.to_flat_state(stacked):
        param.set_metadata(axes=("layers", *param.axes))
    return nnx.merge(graphdef, stacked)


def checkpointed(step: Callable[..., Any], remat: Remat, *, scanned: bool) -> Callable[..., Any]:
    """`step`, recomputed in the backward pass as `remat` says; weights are gathered again whatever it says."""
    rules = parallel.active_rules()
    if remat == "none" and (rules is None or rules.mesh.size == 1):
        return step
    # Outside a loop XLA would merge the recomputation with the original and save nothing: hence prevent_cse.
    run = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=not scanned, static_argnums=(4,))
    return lambda x, *inputs: run(checkpoint_name(x, INPUT), *inputs)


@dataclass(frozen=True)
class Layer:
    """One layer of a stack: how its weights are put together, and what it does with them."""

    gather: Callable[[Any, Any], Any]
    """(parameters of one layer, as they are kept; what of it does not learn) -> its weights, as such a pair."""
    apply: Callable[[jax.Array, Any, Any, Any, Any], tuple[jax.Array, Any]]
    """(x, weights, what all layers share, this layer's own input, kind) -> (x, out), the weights as such a pair."""

    def __call__(
        self, x: jax.Array, params: tuple[Any, Any], shared: Any, own: Any, kind: Any
    ) -> tuple[jax.Array, Any]:
        return self.apply(x, self.gather(*params), shared, own, kind)

    def traced_once(self) -> Layer:
        """Return the same layer, traced once for all layers of a kind; XLA sees each of them."""
        return Layer(jax.jit(self.gather), jax.jit(self.apply, static_argnums=4))


def run_stack(
    layer: Layer,
    x: jax.Array,
    params: Any,
    fixed: Any,
    shared: Any,
    own: Any,
    kinds: tuple[Any, ...],
    period: int,
    *,
    scan: bool,
    remat: Remat,
    prefetch: bool = False,
) -> tuple[jax.Array, Any]:
    """Every layer in order; returns the last x and the stacked outs.

    Args:
        params, fixed, own: pytrees of arrays with a leading layers dim; of a layer's own, only params learn, which may
            be `Unstacked` where nothing is scanned.
        shared: a pytree of arrays; those that are differentiated have their gradient summed over the layers.
        kinds: static, one for each layer, repeating with `period`.
        scan: compile one period of layers and loop over it; layers that do not fill a period are unrolled after.
        prefetch: with remat "full" or "stage", gather the next layer's weights before this layer's products.
    """
    if prefetch and remat in ("full", "stage") and own is None and len(kinds) > 1 and (period == 1 or not scan):
        return _prefetched(layer, kinds, scan, x, params, fixed, shared)
    rules = parallel.active_rules()
    sharded = rules is not None and rules.mesh.size > 1

    traced_once = jax.jit(layer.__call__, static_argnums=4)  # as in `Layer.traced_once`

    def one_of(x: jax.Array, params: Any, shared: Any, own: Any, place: tuple[int, Any]) -> tuple[jax.Array, Any]:
        (learning, fixed), (i, kind) = params, place
        return traced_once(x, (learning, part_of(fixed, i)), shared, own, kind)

    def unrolled(x: jax.Array, stacked: Any, kinds: tuple[Any, ...], *, scanned: bool = False) -> tuple[jax.Array, Any]:
        (params, fixed), own = stacked
        # What is fixed goes into the checkpoint whole: the backward pass would else keep a copy of every layer's.
        step = checkpointed(one_of, remat, scanned=scanned)
        outs = []
        leaves, tree = jax.tree.flatten((params, own), is_leaf=is_unstacked)
        parts = [leaf.parts if isinstance(leaf, Unstacked) else unstack(leaf).parts for leaf in leaves]
        for i, kind in enumerate(kinds):
            params_i, own_i = jax.tree.unflatten(tree, [part[i] for part in parts])
            if sharded:  # or all layers' weights are gathered at the start
                x, (params_i, fixed) = jax.lax.optimization_barrier((x, (params_i, fixed)))
            x, out = step(x, (params_i, fixed), shared, own_i, (i, kind))
            outs.append(out)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

    stacked = ((params, fixed), own)
    groups = len(kinds) // period if scan else 0
    if groups < 2:
        return unrolled(x, stacked, kinds)
    if period == 1:
        # Slices of the stack go straight into the checkpoint: the backward pass then reads the stack itself, where it
        # would keep a copy of what is made of them.
        step = checkpointed(layer, remat, scanned=True)
        return jax.lax.scan(lambda x, slice_: step(x, slice_[0], shared, slice_[1], kinds[0]), x, stacked)
    looped, rest = _cut(stacked, groups * period)
    looped = jax.tree.map(lambda a: a.reshape(groups, period, *a.shape[1:]), looped)
    x, outs = jax.lax.scan(lambda x, group: unrolled(x, group, kinds[:period], scanned=True), x, looped)
    outs = jax.tree.map(lambda a: a.reshape(groups * period, *a.shape[2:]), outs)
    if groups * period < len(kinds):
        x, rest_outs = unrolled(x, rest, kinds[groups * period :])
        outs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), outs, rest_outs)
    return x, outs


@dataclass(frozen=True)
class LayerStack:
    """A model's layers and how they are run: all of them, or those of a stage of a pipeline."""

    layers: nnx.Module
    """Layers, as `init_stack` makes them."""
    block: Callable[..., tuple[jax.Array, Any]]
    """(one layer, x, what all layers share, this layer's own input, kind) -> (x, out)."""
    kinds: tuple[Any, ...]
    """One for each layer, repeating with `period`."""
    period: int
    options: ModelOptions
    num_kv_heads: int | None = None
    """See `gather_weight`."""

    def run(
        self,
        x_BSD: jax.Array,
        side: Any,
        context: Callable[[Any], Any],
        *,
        own: Any = None,
        adapters: AdapterInputs | None = None,
    ) -> tuple[jax.Array, Any]:
        """Every layer in order; returns the last x and the stacked outs, in the order in which the layers are.

        Args:
            x_BSD: a pytree of such arrays, where layers have more than one stream.
            side: arrays with a row for each of x's, which go with it from stage to stage.
            context: side -> what all layers share. Of floating arrays in it there are gradients.
            own: arrays with a leading layers dim, for a model whose layers are all here.
            adapters: what adapters read, where the model has any that do.
        """
        graphdef, params = self._split(adapters)
        key = None if adapters is None else adapters.key
        of_rows = None if adapters is None else (adapters.rows_B, adapters.ids_B)

        def run(x_BSD: jax.Array, params: Any, side: Any) -> tuple[jax.Array, Any]:
            side, of_rows = side
            inputs = None if of_rows is None else AdapterInputs(rows_B=of_rows[0], ids_B=of_rows[1], key=key)
            return self._run(graphdef, params, x_BSD, (context(side), inputs), own)

        if parallel.axis_size("pipeline") == 1:
            return run(x_BSD, params, (side, of_rows))

        options = self.options
        # The microbatches of this device, and its chunks of layers.
        split = functools.partial(jax.tree.map, lambda a: a.reshape(-1, options.microbatch_rows, *a.shape[1:]))
        x_kBSD, outs = parallel.pipelined(
            lambda chunk, x_BSD, side: run(x_BSD, parallel.chunk_of(params, chunk, options.interleave), side),
            split(x_BSD),
            split((side, of_rows)),
            chunks=options.interleave,
            remat=options.remat in ("full", "stage"),
            policy=jax.checkpoint_policies.save_only_these_names(INPUT) if options.remat == "full" else None,
        )
        x_BSD = jax.tree.map(lambda x_k, x: x_k.reshape(x.shape), x_kBSD, x_BSD)
        return x_BSD, jax.tree.map(_among_stages, outs)

    def _split(self, adapters: AdapterInputs | None) -> tuple[Any, Any]:
        """(graphdef, (what learns, (what does not, the layers' places where adapters draw by them)))"""
        graphdef, learning, frozen = nnx.split(self.layers, nnx.Param, ...)  # type: ignore[misc]
        numbers_L = None
        if adapters is not None and adapters.key is not None:
            count = stack_size((learning, frozen))
            numbers_L = parallel.axis_index("pipeline") * count + jnp.arange(count, dtype=jnp.int32)
        return graphdef, (learning, (frozen, numbers_L))

    def _run(self, graphdef: Any, params: Any, x_BSD: jax.Array, shared: Any, own: Any) -> tuple[jax.Array, Any]:
        """These layers, all of them or those of a stage, which begin a period of the kinds."""
        learning, (frozen, numbers_L) = params
        dtype = jax.tree.leaves(x_BSD)[0].dtype

        def gather(learning: nnx.State, fixed: Any) -> Any:
            frozen, number = fixed
            learning, frozen = (gather_weights(s, dtype, self.num_kv_heads) for s in (learning, frozen))
            return learning, (frozen, number)

        def apply(x_BSD: jax.Array, weights: Any, shared: Any, own: Any, kind: Any) -> Any:
            (learning, (frozen, number)), (context, adapters) = weights, shared
            with use_inputs(adapters, number):
                return self.block(nnx.merge(graphdef, learning, frozen), x_BSD, context, own, kind)

        return run_stack(
            Layer(gather, apply),
            x_BSD,
            learning,
            (frozen, numbers_L),
            shared,
            own,
            self.kinds[: stack_size(params)],
            self.period,
            scan=self.options.scan_layers,
            remat=self.options.remat,
            prefetch=self.options.prefetch,
        )


class StackedModel(nnx.Module):
    """A model whose `layers` are of `init_stack`, and run by `block`."""

    layers: nnx.Module

    def __init__(self, config: FamilyConfig, options: ModelOptions):
        if options.remat not in REMAT_POLICIES:
            raise UserError(f"remat: unknown policy {options.remat!r}{did_you_mean(options.remat, REMAT_POLICIES)}")
        self.config, self.options = config, options
        self.adapter_names: tuple[str, ...] = ()
        """Names of the adapters that rows choose from (`trainfw.adapters.attach_bank`)."""

    @staticmethod
    def block(layer: Any, x_BSD: Any, context: Any, own: Any, kind: Any) -> tuple[Any, Any]:
        """Run one layer: (x_BSD, (what it returns of `own`, what its router did))."""
        return layer(x_BSD, context), (own, None)

    @property
    def num_kv_heads(self) -> int | None:
        """Heads of the dim `kv_heads`, where some devices may share one (`gather_weight`)."""
        return None

    @property
    def compute_dtype(self) -> str:
        return self.options.compute_dtype

    @property
    def stack(self) -> LayerStack:
        return LayerStack(
            self.layers, self.block, self.config.layer_kinds, self.config.layer_period, self.options, self.num_kv_heads
        )


def _among_stages(own: jax.Array) -> jax.Array:
    """Put a stage's values of its layers (chunks, layers, ...) in their place among all, with zeros elsewhere."""
    own = own.reshape(-1, *own.shape[2:])
    everyone = jnp.zeros((parallel.axis_size("pipeline") * own.shape[0], *own.shape[1:]), own.dtype)
    return jax.lax.dynamic_update_slice_in_dim(everyone, own, parallel.axis_index("pipeline") * own.shape[0], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _prefetched(
    layer: Layer, kinds: tuple[Any, ...], scan: bool, x: jax.Array, params: Any, fixed: Any, shared: Any
) -> tuple[jax.Array, Any]:
    """`run_stack` with remat "full", the next layer's weights in flight while a layer computes, both ways.

    Written out, since the loops that JAX derives would keep the gathered weights for the backward pass.
    """
    return _prefetched_layers(layer, kinds, scan, x, params, fixed, shared)[0]


def _prefetched_forward(
    layer: Layer, kinds: tuple[Any, ...], scan: bool, x: Any, params: Any, fixed: Any, shared: Any
) -> tuple[Any, Any]:
    """Run the layers, of arguments that say whether they are differentiated (`symbolic_zeros`)."""
    moving = jax.tree.map(lambda primal: primal.value if primal.perturbed else None, shared)
    still = jax.tree.map(lambda primal: None if primal.perturbed else primal.value, shared)
    x, params, fixed, shared = jax.tree.map(lambda primal: primal.value, (x, params, fixed, shared))
    returned, xs = _prefetched_layers(layer, kinds, scan, x, params, fixed, shared)
    return returned, (xs, params, fixed, moving, still)


def _prefetched_layers(
    layer: Layer, kinds: tuple[object, ...], scan: bool, x: jax.Array, params: object, fixed: object, shared: object
) -> tuple[tuple[jax.Array, object], jax.Array]:
    """Return what the layers return, and the input of each."""
    num_layers = len(kinds)
    layer = layer.traced_once()

    def body(carry: Any, i: Any, kind: Any) -> Any:
        x, weights, xs, outs = carry
        # Gathered no sooner than this layer starts, so that two layers' weights are there at a time.
        x, ahead = jax.lax.optimization_barrier((x, part_of((params, fixed), i + 1)))
        following = layer.gather(*ahead)
        y, out = layer.apply(x, weights, shared, None, kind)
        return y, following, _put(xs, i, x), _put(outs, i, out)

    weights = layer.gather(*part_of((params, fixed), 0))
    _, out = jax.eval_shape(lambda x, weights: layer.apply(x, weights, shared, None, kinds[0]), x, weights)
    carry = (x, weights, _room(num_layers, x), _room(num_layers, out))
    x, weights, xs, outs = _loop(body, carry, range(num_layers - 1), kinds, scan=scan)
    y, out = layer.apply(x, weights, shared, None, kinds[-1])
    xs = checkpoint_name(_put(xs, num_layers - 1, x), INPUT)
    return (y, _put(outs, num_layers - 1, out)), xs


def _prefetched_backward(
    layer: Layer, kinds: tuple[Any, ...], scan: bool, kept: Any, cotangents: Any
) -> tuple[Any, Any, None, Any]:
    xs, params, fixed, moving, still = kept
    dx, of_outs = jax.tree.map(_instantiated, cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
    num_layers = len(kinds)
    gather = jax.jit(layer.gather)

    @functools.partial(jax.jit, static_argnums=6)
    def back_one(
        dx: Any, x: jax.Array, weights: Any, of_out: Any, params: Any, fixed: Any, kind: Any
    ) -> tuple[Any, Any, Any]:
        learning, others = weights

        def apply(x: jax.Array, learning: object, moving: object) -> object:
            shared = jax.tree.map(lambda a, b: b if a is None else a, moving, still, is_leaf=lambda a: a is None)
            return layer.apply(x, (learning, others), shared, None, kind)

        _, transpose = jax.vjp(apply, x, learning, moving)
        dx, of_weights, of_moving = transpose((dx, of_out))
        _, scatter = jax.vjp(lambda params: layer.gather(params, fixed)[0], params)
        return dx, scatter(of_weights)[0], of_moving

    def back(dx: Any, x: jax.Array, weights: Any, i: Any, kind: Any, of_moving: Any) -> tuple[Any, Any, Any]:
        dx, own, more = back_one(dx, x, weights, part_of(of_outs, i), part_of(params, i), part_of(fixed, i), kind)
        return dx, own, jax.tree.map(lambda total, part: total + part.astype(total.dtype), of_moving, more)

    def body(carry: Any, i: Any, kind: Any) -> Any:
        dx, weights, of_params, of_moving = carry
        # The barrier also keeps what is computed again apart from what was computed before.
        dx, x, ahead = jax.lax.optimization_barrier((dx, part_of(xs, i), part_of((params, fixed), i - 1)))
        preceding = gather(*ahead)
        dx, own, of_moving = back(dx, x, weights, i, kind, of_moving)
        return dx, preceding, _put(of_params, i, own), of_moving

    dx, last = jax.lax.optimization_barrier((dx, part_of((params, fixed), num_layers - 1)))
    wide = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), moving)
    carry = (dx, gather(*last), jax.tree.map(jnp.zeros_like, params), wide)
    dx, weights, of_params, of_moving = _loop(body, carry, range(num_layers - 1, 0, -1), kinds, scan=scan)
    dx, x = jax.lax.optimization_barrier((dx, part_of(xs, 0)))  # the first layer too waits for its turn
    dx, own, of_moving = back(dx, x, weights, 0, kinds[0], of_moving)
    of_moving = jax.tree.map(lambda a, total: total.astype(a.dtype), moving, of_moving)
    return dx, _put(of_params, 0, own), None, of_moving


def _instantiated(cotangent: SymbolicZero | jax.Array) -> jax.Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


_prefetched.defvjp(_prefetched_forward, _prefetched_backward, symbolic_zeros=True)


def _loop(body: Callable[[Any, Any, Any], Any], carry: Any, order: range, kinds: tuple[Any, ...], *, scan: bool) -> Any:
    """`carry = body(carry, i, kinds[i])` for every i; scanned, all layers are of one kind."""
    if scan:
        return jax.lax.scan(lambda carry, i: (body(carry, i, kinds[0]), None), carry, jnp.array(order, jnp.int32))[0]
    for i in order:
        carry = body(carry, i, kinds[i])
    return carry


def part_of(stacked: Any, i: Any) -> Any:
    """Return one layer's part of stacked arrays, or of `Unstacked`."""
    index = jax.lax.index_in_dim if isinstance(i, int) else jax.lax.dynamic_index_in_dim

    def of(x: Any) -> jax.Array:
        return x.parts[i] if isinstance(x, Unstacked) else index(x, i, keepdims=False)

    return jax.tree.map(of, stacked, is_leaf=is_unstacked)


def _put(stacked: Any, i: Any, one: Any) -> Any:
    return jax.tree.map(lambda a, part: jax.lax.dynamic_update_index_in_dim(a, part, i, 0), stacked, one)


def _room(num_layers: int, one: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros((num_layers, *a.shape), a.dtype), one)


def _cut(stacked: Any, at: int) -> tuple[Any, Any]:
    # lax.split, not slices: its transpose is one concatenation, where every slice would pad a whole gradient.
    cut = jax.tree.map(lambda a: tuple(jax.lax.split(a, (at, a.shape[0] - at))), stacked)
    return jax.tree.transpose(jax.tree.structure(stacked), jax.tree.structure((0, 0)), cut)
