"""Decoding on a CPU, token by token, with weights and caches in the form that a token's products read fastest.

The time of a token is that of reading all weights from memory. The scan of `Transformer.decode` first copies every
layer's weights out of the stacked ones, which takes most of its time; here each layer has arrays of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw import backends, models

Tree = TypeVar("Tree")

_GROUPS = {"attention": (("query", "key", "value"), ("output",)), "mlp": (("gate", "up"), ("down",))}
"""Groups of a layer's linear maps that share an input."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCaches:
    """Keys and values of the tokens decoded so far, as in `KVCache`, but with arrays for each layer."""

    layers: tuple[models.HeadCache, ...]
    length: jax.Array
    first_B: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Elsewhere:
    """Stand-in for a kernel that has been joined with others."""

    shape: tuple[int, ...] = field(metadata={"static": True})


@dataclass(frozen=True)
class DecodingWeights:
    """A model's weights in the form for decoding."""

    layers: tuple[Any, ...]
    """States (learning, frozen) of each layer."""
    joined: tuple[dict[str, jax.Array], ...]
    """Joined kernels of each layer, by the names of `_GROUPS`, in the form of the backend's products; may be empty."""


def decodes_by_layer(model: models.Transformer) -> bool:
    """Tell whether `decode_token` suits this model: all of it is in the memory of one CPU.

    On other devices each layer's weights would be copies, in memory that models fill.
    """
    leaves = jax.tree.leaves(nnx.state(model))
    if backends.current().simulated or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return False
    devices = {device for leaf in leaves for device in leaf.devices()}
    return len(devices) == 1 and backends.is_host(devices.pop())


_prepared: weakref.WeakKeyDictionary[models.Transformer, tuple[Any, list[Any], DecodingWeights]]
_prepared = weakref.WeakKeyDictionary()


def decoding_weights(model: models.Transformer, rows: int) -> DecodingWeights:
    """Return the weights in the form for decoding so many rows.

    They are kept with the model for the next call with the same arrays, one form at a time: another number of rows,
    dtype or array replaces it. Each layer's weights are views of the stacked ones, unless they are computed in another
    dtype. Joined kernels are copies: they take as much memory again, if the machine has it to spare.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.layers)))
    spare = size < backends.free_memory() // 4
    kernels = decoding_kernels(model.compute_dtype, rows) if spare else None
    kind = model.compute_dtype, 0 if kernels is None else min(rows, 2)
    sources = jax.tree.leaves(nnx.state(model))
    prepared = _prepared.pop(model, None)  # before others are made: memory may not hold two copies
    if prepared is not None and prepared[0] == kind and list(map(id, prepared[1])) == list(map(id, sources)):
        _prepared[model] = prepared
        return prepared[2]
    del prepared
    dtype = jnp.dtype(model.compute_dtype)
    _, learning, frozen = nnx.split(model.layers, nnx.Param, ...)  # type: ignore[misc]
    states = tuple(models.gather_weights(state, dtype, model.num_kv_heads) for state in (learning, frozen))
    # On a CPU, NumPy's views of an array and JAX's of these share its memory.
    leaves, structure = jax.tree.flatten(states)
    (device,) = leaves[0].devices()
    hosts, count = [np.asarray(leaf) for leaf in leaves], model.config.num_layers
    layers = tuple(jax.tree.unflatten(structure, [jax.device_put(h[i], device) for h in hosts]) for i in range(count))
    joined: tuple[dict[str, jax.Array], ...] = tuple({} for _ in layers)
    if kernels is not None and (groups := _joinable(model)):
        join = jax.jit(kernels.joined, static_argnums=1)
        for layer, products in zip(layers, joined):
            of = {_name(path): v.get_value() for state in layer for path, v in nnx.to_flat_state(state)}
            for group in groups:
                # One row takes a kernel as it lies: no copy.
                make = join if rows > 1 or len(group) > 1 else kernels.joined
                products[" ".join(group)] = make([of[f"{path}.kernel"] for path in group], rows)
        names = {f"{path}.kernel" for group in groups for path in group}
        layers = tuple(tuple(_without(state, names) for state in layer) for layer in layers)
    weights = DecodingWeights(layers, joined)
    _prepared[model] = kind, sources, weights
    return weights


def _name(path: Sequence[object]) -> str:
    return ".".join(map(str, path))


def _without(state: nnx.State, names: set[str]) -> nnx.State:
    """Return a state in which stand-ins replace the values of these variables."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, v.replace(_Elsewhere(v.get_value().shape)) if _name(path) in names else v) for path, v in flat]
    )


def decoding_kernels(dtype: str, rows: int) -> Any:
    """Return the backend's products of so many rows, a module such as `backends.cpu.decoding`; None without any."""
    return backends.resolve("decoding", backends.DecodingRequest(dtype, rows), backends.current()).call


def _joinable(model: models.Transformer) -> list[tuple[str, ...]]:
    """List the groups of linear maps, by path, that are plain matrices in float32 without adapters."""
    modules = {owner: getattr(model.layers, owner) for owner in _GROUPS}
    return [
        tuple(f"{owner}.{name}" for name in names)
        for owner, module in modules.items()
        for names in (() if isinstance(module, models.MoE) else _GROUPS[owner])
        if all(_plain(getattr(module, name)) for name in names)
    ]


def _plain(linear: models.Linear) -> bool:
    kernel = linear.kernel.get_value()
    frozen_narrow = isinstance(linear.kernel, models.Frozen) and getattr(kernel, "dtype", None) != jnp.float32
    return linear.adapter is None and isinstance(kernel, jax.Array) and not frozen_narrow


def by_layer(cache: models.KVCache, length: int) -> LayerCaches:
    """Convert a cache of stacked layers to one with arrays for each layer and with room for `length` tokens."""
    more = length - cache.keys_LBTKh.shape[2]
    pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    keys, values = (jnp.pad(x, pad) for x in (cache.keys_LBTKh, cache.values_LBTKh))
    layers = tuple(
        models.HeadCache(keys[i].transpose(0, 2, 3, 1), values[i].transpose(0, 2, 1, 3)) for i in range(keys.shape[0])
    )
    return LayerCaches(layers, cache.length, cache.first_B)


def decode_token(
    model: models.Transformer,
    weights: tuple[Any, Any],
    tokens_B: jax.Array,
    cache: LayerCaches,
    adapters: models.AdapterInputs | None,
) -> tuple[jax.Array, LayerCaches]:
    """Return (logits_BV of the token after each row's newest, the cache with the newest tokens).

    Args:
        weights: the layers and the joined kernels of `DecodingWeights`, in place of the model's own layers.
        tokens_B: each row's newest token.
    """
    config, rows = model.config, tokens_B.shape[0]
    positions_BS = cache.length[None, None]
    if cache.first_B is not None:
        positions_BS = jnp.maximum(positions_BS - cache.first_B[:, None], 0)
    context = models.Context(model.turns(positions_BS), start=cache.length, first_B=cache.first_B)
    kernels = decoding_kernels(model.compute_dtype, rows)
    x_BSD, graphdef = model.embed(tokens_B[:, None]), nnx.split(model.layers, nnx.Param, ...)[0]
    caches = []
    with models.use_inputs(adapters):
        for states, joined, layer_cache, kind in zip(*weights, cache.layers, config.layer_kinds, strict=True):
            layer: Any = nnx.merge(graphdef, *states)
            _join(layer, joined, kernels)
            x_BSD, (extended, _) = layer(x_BSD, context, layer_cache, kind)
            caches.append(extended)
    x_BSD = model.final_norm(x_BSD)
    w, dims = model.head_weight()
    if kernels is not None and rows > 1 and dims == "vd":
        logits_BV = models.softcap(kernels.columns(x_BSD[:, 0], w), config.final_softcap)
    else:
        logits_BV = model.logits(x_BSD)[:, 0]
    return logits_BV, LayerCaches(tuple(caches), cache.length + 1, cache.first_B)


def _join(layer: models.DecoderLayer, joined: dict[str, jax.Array], kernels: object) -> None:
    """Let the linear maps of each group compute one product together."""
    for key, w in joined.items():
        paths = [path.split(".") for path in key.split()]
        owners = [getattr(layer, owner) for owner, _ in paths]
        linears = [getattr(owner, name) for owner, (_, name) in zip(owners, paths)]
        product, start = _Product(kernels, w), 0
        for owner, (_, name), linear in zip(owners, paths, linears):
            end = start + linear.kernel.get_value().shape[-1]
            setattr(owner, name, _Part(product, slice(start, end), linear.bias))
            start = end


class _Product:
    """A product with joined kernels, computed once for the same argument."""

    def __init__(self, kernels: Any, w: jax.Array):
        self.kernels, self.w = kernels, w
        self.last: tuple[jax.Array, jax.Array] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.last is None or self.last[0] is not x:
            self.last = x, self.kernels.product(x.reshape(-1, x.shape[-1]), self.w)
        return self.last[1]


class _Part:
    """A linear map whose results are some columns of a product."""

    def __init__(self, product: _Product, part: slice, bias: nnx.Param | None):
        self.product, self.part, self.bias = product, part, bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x)[:, self.part].reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
