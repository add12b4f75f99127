"""Weights of a server in the forms that products of few rows read fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw import backends
from trainfw.adapters import Bank, adaptable
from trainfw.models import FewRows, LanguageModel, Linear, abstract_unstacked, unstack
from trainfw.quantization import Quantized
from trainfw.weights import Tree


@dataclass(frozen=True)
class Forms:
    """Names of the weights that functions take in another form than they are kept in, on one device."""

    apart: bool
    """Each layer's arrays are by themselves."""
    turned: frozenset[str] = frozenset()
    """Kernels as (out, in)."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Kernels that hold others' columns after their own: the names of all, whose own arrays are left empty."""
    compiler_options: Mapping[str, str] = field(default_factory=dict)

    def sources(self, name: str) -> tuple[str, ...]:
        """List the weights that `formed` takes for this one."""
        return self.joined.get(name, (name,))

    def formed(self, name: str, *sources: Tree) -> Tree:
        """Return a weight, of all layers, as functions take it."""
        weight = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *sources)
        if any(name in names[1:] for names in self.joined.values()):
            weight = jax.tree.map(lambda x: x[..., :0], weight)
        if name in self.turned:
            weight = turned_round(weight)
        return unstack(weight) if self.is_apart(name) else weight

    def is_apart(self, name: str) -> bool:
        return self.apart and name.startswith("layers.")

    def described(self, name: str, kept: Mapping[str, Tree]) -> Tree:
        """Describe a weight as functions take it, given descriptions with shardings of all as they are kept."""
        like = kept[name]
        if name in self.turned or any(name in names for names in self.joined.values()):
            whole, sharding = replace(self, apart=False), jax.tree.leaves(like)[0].sharding
            shapes = jax.eval_shape(
                lambda *sources: whole.formed(name, *sources), *(kept[source] for source in self.sources(name))
            )
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        return abstract_unstacked(like) if self.is_apart(name) else like


def turned_round(weight: Tree) -> Tree:
    """Swap the last two dims of an array or of an int8 weight."""
    if isinstance(weight, Quantized):
        codes, scales = (jnp.swapaxes(x, -1, -2) for x in (weight.codes, weight.scales))
        return Quantized(codes, scales, dim=-3 - weight.dim)
    return jnp.swapaxes(weight, -1, -2)


def choose_forms(model: LanguageModel, slots: int) -> Forms:
    """Have a model of one device, whose weights are as they are kept, multiply as the backend does for few rows.

    The weights may be descriptions. Return the forms that it then takes them in.
    """
    if model.options.scan_layers:
        return Forms(apart=False)
    turned: set[str] = set()
    options: dict[str, str] = {}

    def product(name: str, weight: Tree) -> FewRows | None:
        kept = ("int8" if weight.low is None else "nf4") if isinstance(weight, Quantized) else weight.dtype.name
        request = backends.DecodingRequest(model.compute_dtype, slots, kept)
        chosen = backends.resolve("decoding", request, backends.current()).call
        if chosen is None:
            return None
        made: Any = chosen
        options.update(made.compiler_options)
        if name == "embedding.table":  # which lies turned
            return made.multiply if made.turned else None
        turned.update([name] if made.turned else [])
        return made.multiply

    for name, linear in adaptable(model).items():
        if isinstance(linear, Linear) and name != "head" and _is_plain(linear):
            linear.few_rows = product(f"{name}.kernel", linear.kernel.get_value())
    if model.head is None:
        model.few_rows = product("embedding.table", model.embedding.table.get_value())
    elif model.head.adapter is None:
        model.few_rows = product("head.kernel", model.head.kernel.get_value())
    return Forms(True, frozenset(turned), dict(_joined(model)), options)


def _is_plain(linear: Linear) -> bool:
    return not linear.fp8 and (linear.adapter is None or isinstance(linear.adapter, Bank))


def _joined(model: LanguageModel) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Have linear maps of the same inputs multiply as one, where their kernels are of one form."""
    for path, module in nnx.iter_modules(model):
        names = getattr(module, "TOGETHER", ())
        linears = [getattr(module, name) for name in names]
        paths = tuple(".".join(map(str, (*path, name, "kernel"))) for name in names)
        structures = {jax.tree.structure(x.kernel.get_value()) for x in linears}
        dtypes = {jax.tree.leaves(x.kernel.get_value())[0].dtype for x in linears}
        alike = len(structures) == len(dtypes) == len({x.few_rows for x in linears}) == 1
        if alike and all(x.few_rows is not None and x.adapter is None for x in linears):
            linears[0].joined = tuple(x.kernel.get_value().shape[-1] for x in linears)
            yield paths[0], paths
