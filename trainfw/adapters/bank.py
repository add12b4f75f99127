from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.adapters.config import AdapterConfig
from trainfw.adapters.lora import Bank
from trainfw.adapters.placing import adaptable, targets
from trainfw.errors import UserError
from trainfw.models import ExpertLinear, Frozen, LanguageModel, Linear, dense
from trainfw.quantization import Quantized


def attach_bank(model: LanguageModel, adapters: Mapping[str, tuple[AdapterConfig, Mapping[str, np.ndarray]]]) -> None:
    """Put several adapters on a model, in place; `AdapterInputs.rows_B` chooses one for each row.

    A row's value i takes adapter i of `adapters`, the value len(adapters) the base itself; `model.adapter_names` holds
    the names. Raises UserError for adapters of experts, embeddings or the head, which all rows share.
    """
    modules = adaptable(model)
    chosen = {name: targets(config, modules) for name, (config, _) in adapters.items()}
    linears: dict[str, Linear] = {}
    for name, sizes in chosen.items():
        for module in sizes:
            linear = modules[module]
            if not isinstance(linear, Linear) or not module.startswith(("layers.", "last.")):
                target = "the experts' " * isinstance(linear, ExpertLinear) + module
                only = "in a batch with others only linear maps can be, not that"
                raise UserError(f"adapter {name}: adapts {target}; {only}")
            linears[module] = linear
    for module, linear in linears.items():
        linear.adapter = _bank(module, linear, [(*adapters[name], chosen[name].get(module)) for name in adapters])
    model.adapter_names = tuple(adapters)


def attach_places(model: nnx.Module, places: int, rank: int) -> None:
    """Put empty places for adapters on every linear map of the layers, in place: zeros, and one more for the base.

    Experts, the embedding and the head have none.
    """
    for name, linear in adaptable(model).items() if places else ():
        if isinstance(linear, Linear) and name.startswith("layers."):
            *stacked, D, F = linear.kernel.get_value().shape
            *stack, ins, outs = linear.kernel.axes
            linear.adapter = Bank(
                Frozen(jnp.zeros((*stacked, D, places + 1, rank)), axes=(*stack, ins, None, None)),
                Frozen(jnp.zeros((*stacked, places + 1, rank, F)), axes=(*stack, None, None, outs)),
                Frozen(jnp.ones((*stacked, places + 1, F)), axes=(*stack, None, outs), wide=True),
            )


def _bank(
    module: str,
    linear: Linear,
    adapters: Sequence[tuple[AdapterConfig, Mapping[str, np.ndarray], tuple[int, float] | None]],
) -> Bank:
    *stacked, D, F = linear.kernel.get_value().shape  # one layer's, or those of a stack
    rank, count = max(size[0] for _, _, size in adapters if size is not None), len(adapters) + 1
    # The base comes last, as an adapter of zeros.
    a, b = np.zeros((*stacked, D, count, rank), np.float32), np.zeros((*stacked, count, rank, F), np.float32)
    factor = np.ones((*stacked, count, F), np.float32)
    for i, (config, arrays, size) in enumerate(adapters):
        if size is None:
            continue
        lora_a, lora_b = (np.asarray(arrays[f"{module}.adapter.lora_{part}"], np.float32) for part in "ab")
        a[..., i, : size[0]] = lora_a
        b[..., i, : size[0], :] = lora_b * config.scale(*size)
        if config.kind == "dora":
            magnitude = arrays[f"{module}.adapter.magnitude"]
            factor[..., i, :] = dora_factor(linear.kernel.get_value(), a[..., i, :], b[..., i, :, :], magnitude)
    *stack, ins, outs = linear.kernel.axes
    value: Any = Frozen(jnp.asarray(factor), axes=(*stack, None, outs), wide=True)
    return Bank(
        Frozen(jnp.asarray(a), axes=(*stack, ins, None, None)),
        Frozen(jnp.asarray(b), axes=(*stack, None, None, outs)),
        value if np.any(factor != 1.0) else None,
    )


def dora_factor(kernel: jax.Array | Quantized, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Return what a row of DoRA multiplies W x + s A B x by, m / |W + s A B| of each column, f32 (..., F).

    Args:
        a, b: of the low-rank update, f32 (..., D, r) and (..., r, F), the latter with the scale in it.
    """
    return np.asarray(magnitude, np.float32) / np.asarray(_column_lengths(kernel, a, b))


@jax.jit
def _column_lengths(kernel: jax.Array | Quantized, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return |W + s A B| of each column, f32 (..., F)."""
    return jnp.sqrt(jnp.sum(jnp.square(dense(kernel, jnp.float32) + jnp.matmul(a, b)), axis=-2))
