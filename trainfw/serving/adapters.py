"""Adapters that come and go while a server runs: each fills a place that the programs have for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.adapters import AdapterConfig, config_targets, dora_factor
from trainfw.errors import UserError
from trainfw.models import Unstacked, part_of
from trainfw.program import Server, shardings_of, turned_round
from trainfw.weights import Base, Tree, read_adapter

Banks: TypeAlias = dict[str, dict[str, Any]]
"""Arrays `a`, `b` and `factor` of every linear map that has places, by the module's name."""
_PARTS = {"a": -2, "b": -3, "factor": -2}
"""The dim of each along which the places lie."""


class AdapterPlaces:
    """Loader of adapters into a server's places."""

    def __init__(self, server: Server, params: Tree, base: Base, path: str):
        """Find the places. `base`, opened at `path`, is what the weights were read from."""
        self._server, self._base, self._path = server, base, path
        self._modules = list(_owners(server.abstract_kept))
        self._kernels = {module: _at(params, module)["kernel"] for module in self._modules}
        banks = _banks(server.abstract_params, self._modules)
        self._fill = jax.jit(_filled, donate_argnums=0, out_shardings=shardings_of(banks))

    def read(self, path: str) -> Banks:
        """Read an adapter, a run or a directory in PEFT's form, for a place: f32, stacked over layers.

        Raises UserError where there is none, it was trained on another base, its rank is above the server's, or it
        adapts what has no place.
        """
        config, most = self._server.recipe.model, self._server.shape.rank
        adapter = read_adapter(path, config)
        adapter.check_base(self._base, self._path)
        sizes = config_targets(adapter.config, config)
        if others := sorted(sizes.keys() - set(self._modules)):
            raise UserError(f"{path}: adapts {others[0]}; a server has places in linear maps of the layers alone")
        if (rank := max(rank for rank, _ in sizes.values())) > most:
            raise UserError(f"{path}: is of rank {rank}; this server has places for rank {most} at most")
        return {module: self._of(module, adapter.config, adapter.arrays, sizes.get(module)) for module in self._modules}

    def _of(
        self, module: str, config: AdapterConfig, arrays: Mapping[str, np.ndarray], size: tuple[int, float] | None
    ) -> dict[str, np.ndarray]:
        """Return one module's arrays, zeros and ones where the adapter has none."""
        like = _at(self._server.abstract_kept, module)["adapter"]
        a, b, factor = (np.zeros(np.delete(like[part].shape, dim), np.float32) for part, dim in _PARTS.items())
        factor[:] = 1.0
        if size is not None:
            lora_a, lora_b = (np.asarray(arrays[f"{module}.adapter.lora_{part}"], np.float32) for part in "ab")
            a[..., : size[0]] = lora_a
            b[:, : size[0]] = lora_b * config.scale(*size)
            if config.kind == "dora":
                magnitude = arrays[f"{module}.adapter.magnitude"]
                for layer in range(a.shape[0]):  # one matrix at a time is there in full
                    kernel = part_of(self._kernels[module], layer)
                    if f"{module}.kernel" in self._server.forms.turned:
                        kernel = turned_round(kernel)
                    factor[layer] = dora_factor(kernel, a[layer], b[layer], magnitude[layer])
        return dict(zip(_PARTS, (a, b, factor)))

    def put(self, params: Tree, banks: Banks, place: int) -> Tree:
        """Return the weights with an adapter at a place. The arrays of places are donated; the others are the same."""
        filled = self._fill(_banks(params, self._modules), banks, np.int32(place))
        params = jax.tree.map(lambda x: x, params)  # the dicts anew
        for module, parts in filled.items():
            _at(params, module)["adapter"].update(parts)
        return params


def _filled(banks: Banks, values: Banks, place: jax.Array) -> Banks:
    def fill(bank: jax.Array, value: jax.Array, dim: int) -> jax.Array:
        row = jnp.expand_dims(value.astype(bank.dtype), dim)
        return jax.lax.dynamic_update_slice_in_dim(bank, row, place, bank.ndim + dim)

    def of_part(bank: jax.Array | Unstacked, value: jax.Array, dim: int) -> jax.Array | Unstacked:
        if isinstance(bank, Unstacked):
            return Unstacked(tuple(fill(part, value[i], dim) for i, part in enumerate(bank.parts)))
        return fill(bank, value, dim)

    return {
        module: {part: of_part(bank[part], values[module][part], dim) for part, dim in _PARTS.items()}
        for module, bank in banks.items()
    }


def _banks(params: Tree, modules: list[str]) -> Banks:
    return {module: {part: _at(params, module)["adapter"][part] for part in _PARTS} for module in modules}


def _owners(tree: Tree, path: str = "") -> list[str]:
    """List the modules that have places."""
    found = [path] if "adapter" in tree else []
    for name, part in tree.items():
        if isinstance(part, dict) and name != "adapter":
            found += _owners(part, f"{path}.{name}".lstrip("."))
    return found


def _at(tree: Tree, module: str) -> Tree:
    for name in module.split("."):
        tree = tree[name]
    return tree
