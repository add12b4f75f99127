"""Servers of models by themselves: by config, or as they are in the memory of one device."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from trainfw import backends
from trainfw.models import CacheDtype, FamilyConfig, LanguageModel, Unstacked
from trainfw.program.fit import fit
from trainfw.program.serve import Server, ServerShape, server_on
from trainfw.quantization import Quantized
from trainfw.recipe import Recipe, load_recipe
from trainfw.weights import Tree, map_named, named

KeptAs = Literal["float32", "bfloat16", "int8", "nf4"]


def serving_recipe(
    config: FamilyConfig,
    *,
    weights: KeptAs,
    compute_dtype: Literal["float32", "bfloat16"],
    layout: Mapping[str, int] | None = None,
    scan_layers: bool = False,
    hardware: Mapping[str, object] | None = None,
) -> Recipe:
    """Return the recipe of a server of a model.

    Args:
        weights: what they are kept as.
        layout: sizes of mesh axes, by default `data: 1`.
    """
    model = config.model_dump(by_alias=True, exclude={"from_"})
    if model.get("moe") is not None:
        model["moe"]["dispatch"] = "capacity"  # which drops nothing here, and is what every backend takes
    given = {
        "name": "serve",
        "model": model,
        "adapter": {"base": weights},
        "data": {"sequence_length": 16 * (layout or {}).get("tensor", 1)},  # of which nothing is read
        "train": {"compute_dtype": compute_dtype, "scan_layers": scan_layers},
        "parallel": {"fsdp": 1, **(layout or {})},
        "hardware": dict(hardware or {}),
    }
    return load_recipe(given)


def default_cache(compute_dtype: str) -> CacheDtype:
    """Return the dtype of keys and values for a server that computes in `compute_dtype`."""
    return "float32" if backends.current().wide_caches or compute_dtype == "float32" else "bfloat16"


def server_of(model: LanguageModel, shape: ServerShape) -> tuple[Server, Tree]:
    """Return the server of a model on its device, and the model's weights as its functions take them.

    It is made once for models of the same shapes. On a CPU with memory to spare, weights are copied to the forms that a
    token's products read fastest, and kept so as long as the model exists, for the next call with the same arrays;
    elsewhere they are the model's own.
    """
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    device = min(leaves[0].devices(), key=lambda device: device.id)
    backend = backends.current()
    apart = backends.is_host(device) and not backend.simulated
    spare = apart and sum(leaf.nbytes for leaf in leaves) < backends.free_memory() // 4
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    choices = backend.platform, backend.simulated, backend.top_k
    server = _server_like(graphdef, structure, shapes, shape, device, choices, apart, spare)
    previous = _formed.pop(model, None)  # before others are made: memory may not hold two copies
    form = server.forms, [leaf.dtype for leaf in jax.tree.leaves(server.abstract_params)]
    if previous is None or previous[0] != form or [*map(id, previous[1])] != [*map(id, leaves)]:
        del previous
        previous = form, leaves, _weights_of(server, model, device)
    _formed[model] = previous
    return server, previous[2]


_formed: weakref.WeakKeyDictionary[LanguageModel, tuple[Any, list[Any], Tree]] = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=16)
def _server_like(
    graphdef: nnx.GraphDef[LanguageModel],
    structure: Any,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    shape: ServerShape,
    device: jax.Device,
    choices: object,
    apart: bool,
    spare: bool,
) -> Server:
    """Return the server of models of these shapes; `choices` of the backend decide with the rest."""
    model = nnx.merge(graphdef, jax.tree.unflatten(structure, shapes))
    model.options = replace(model.options, scan_layers=not apart, remat="none", prefetch=False)
    dtype = model.compute_dtype
    recipe = serving_recipe(model.config, weights=dtype, compute_dtype=dtype, scan_layers=not apart)  # type: ignore[arg-type]
    place = fit(recipe, [device], None)
    kept = _described(model, dtype if spare else "float32", NamedSharding(place.mesh, PartitionSpec()))
    return server_on(place, recipe, shape, model, kept, few_rows=spare)


def _described(model: LanguageModel, dtype: str, sharding: NamedSharding) -> Tree:
    """Describe a model's weights: those in f32 in `dtype`, but for wide ones, which are used in f32."""

    def of(variable: nnx.Variable) -> Tree:
        value = variable.get_value()
        wide = isinstance(value, Quantized) or value.dtype != np.float32 or variable.get_metadata().get("wide")
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype if wide else dtype, sharding=sharding), value
        )

    flat = nnx.to_flat_state(nnx.state(model))
    return nnx.to_pure_dict(nnx.from_flat_state([(path, of(variable)) for path, variable in flat]))


def _weights_of(server: Server, model: LanguageModel, device: jax.Device) -> Tree:
    forms, tree = server.forms, nnx.to_pure_dict(nnx.state(model))
    weights, like = dict(named(tree)), dict(named(server.abstract_kept))
    changed = {*forms.turned, *(name for names in forms.joined.values() for name in names)}

    def form(name: str, weight: Tree) -> Tree:
        narrows = not isinstance(weight, Quantized) and weight.dtype != like[name].dtype
        sources = [jax.device_put(weights[source], device) for source in forms.sources(name)]
        if name not in changed and not narrows:
            return _views(sources[0], device) if forms.is_apart(name) else sources[0]

        def made(*sources: Tree) -> Tree:
            if narrows:
                sources = tuple(source.astype(like[name].dtype) for source in sources)
            return forms.formed(name, *sources)

        return jax.jit(made)(*sources)

    return map_named(form, tree)


def _views(weight: Tree, device: jax.Device) -> Tree:
    """Return each layer's part of arrays of a CPU, of which NumPy's views and JAX's of these share the memory."""

    def parts(x: jax.Array) -> Unstacked:
        host = np.asarray(x)
        return Unstacked(tuple(jax.device_put(host[i], device) for i in range(host.shape[0])))

    return jax.tree.map(parts, weight)
