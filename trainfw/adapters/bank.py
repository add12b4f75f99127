from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.adapters.config import AdapterConfig
from trainfw.adapters.lora import Bank
from trainfw.adapters.placing import adaptable, targets
from trainfw.errors import UserError
from trainfw.models import Frozen, Linear, Transformer, dense


def attach_bank(model: Transformer, adapters: Mapping[str, tuple[AdapterConfig, Mapping[str, np.ndarray]]]) -> None:
    """Put several adapters on a model, in place, for `AdapterInputs.rows_B` to choose from.

    Row value i takes adapter i of `adapters`, their number the base itself; `model.adapter_names` holds the names.
    Raises UserError for adapters of experts, embeddings or the head, which rows do not have of their own.
    """
    modules = adaptable(model)
    names: dict[str, None] = {}
    for name, (config, _) in adapters.items():
        for module in targets(config, modules):
            if not isinstance(modules[module], Linear) or not module.startswith("layers."):
                raise UserError(f"adapter {name}: adapts {module}; beside others only linear maps of layers can be")
            names[module] = None
    for module in names:
        linear = modules[module]
        assert isinstance(linear, Linear)
        linear.adapter = _bank(module, linear, adapters)
    model.adapter_names = tuple(adapters)


def _bank(module: str, linear: Linear, adapters: Mapping[str, tuple[AdapterConfig, Mapping[str, np.ndarray]]]) -> Bank:
    L, D, F = linear.kernel.get_value().shape
    sizes = [
        targets(config, [module]).get(module) if _has(arrays, module) else None for config, arrays in adapters.values()
    ]
    rank = max(size[0] for size in sizes if size is not None)
    # And the base: an adapter of zeros.
    a, b = np.zeros((L, len(sizes) + 1, D, rank), np.float32), np.zeros((L, len(sizes) + 1, rank, F), np.float32)
    factor = np.ones((L, len(sizes) + 1, F), np.float32)
    for i, (size, (config, arrays)) in enumerate(zip(sizes, adapters.values(), strict=True)):
        if size is None:
            continue
        own_a, own_b = (np.asarray(arrays[f"{module}.adapter.lora_{part}"], np.float32) for part in "ab")
        a[:, i, :, : size[0]] = own_a
        b[:, i, : size[0]] = own_b * config.scale(*size)
        if config.kind == "dora":
            factor[:, i] = np.asarray(arrays[f"{module}.adapter.magnitude"], np.float32) / _lengths(
                linear, a[:, i], b[:, i]
            )
    value: Any = Frozen(jnp.asarray(factor), axes=("layers", None, linear.kernel.axes[-1]), wide=True)
    return Bank(
        Frozen(jnp.asarray(a), axes=("layers", None, linear.kernel.axes[-2], None)),
        Frozen(jnp.asarray(b), axes=("layers", None, None, linear.kernel.axes[-1])),
        value if np.any(factor != 1.0) else None,
    )


def _has(arrays: Mapping[str, Any], module: str) -> bool:
    return f"{module}.adapter.lora_a" in arrays


@jax.jit
def _columns(kernel: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(dense(kernel, jnp.float32) + jnp.matmul(a, b)), axis=-2))


def _lengths(linear: Linear, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|W + s A B| by columns."""
    return np.asarray(_columns(linear.kernel.get_value(), a, b))
