from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.adapters.config import PRESETS, AdapterConfig
from trainfw.adapters.lora import EmbeddingLoRA, LoRA
from trainfw.errors import UserError, did_you_mean
from trainfw.models import Embedding, ExpertLinear, FamilyConfig, Linear, abstract_model, dense, freeze

Module = Linear | ExpertLinear | Embedding


def adaptable(model: nnx.Module) -> dict[str, Module]:
    """Return the modules that can have adapters, by name: linear maps (no routers), those of experts, the embedding."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Module) and weight_of(module).axes[-1] != "router"
    }


def weight_of(module: Module) -> nnx.Variable:
    """Return the matrix, or stack of matrices, of a linear map or an embedding."""
    return module.table if isinstance(module, Embedding) else module.kernel


def attach(model: nnx.Module, config: AdapterConfig, rngs: nnx.Rngs) -> None:
    """Freeze the model and put adapters on it, in place: A uniform in ±1/sqrt(in), as PEFT draws it; B zero.

    DoRA's magnitudes are zero until `with_magnitudes` sets them. Raises UserError for targets that match nothing, or
    that this `kind` cannot adapt.
    """
    modules = adaptable(model)
    chosen = targets(config, modules)
    freeze(model)
    for name, (rank, alpha) in chosen.items():
        weight = weight_of(module := modules[name])
        shape, axes = weight.get_value().shape, tuple(weight.axes)
        if config.kind == "dora" and not isinstance(module, Linear):
            raise UserError(f"kind = 'dora': is for linear maps, not {name}; choose other targets, or lora")
        if config.dropout and name in ("embedding", "head"):
            raise UserError(f"dropout = {config.dropout}: is not for {name}; set it to 0, or choose other targets")
        bound = 1.0 / math.sqrt(shape[-2])
        drawn = jax.random.uniform(rngs.params(), (*shape[:-1], rank), jnp.float32, -bound, bound)
        a = nnx.Param(drawn, axes=(*axes[:-1], None))
        b = nnx.Param(jnp.zeros((*shape[:-2], rank, shape[-1]), jnp.float32), axes=(*axes[:-2], None, axes[-1]))
        scale = config.scale(rank, alpha)
        if isinstance(module, Embedding):
            module.adapter = EmbeddingLoRA(a, b, scale=scale)
            continue
        magnitude = None
        if config.kind == "dora":
            zeros = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
            magnitude = nnx.Param(zeros, axes=(*axes[:-2], axes[-1]), wide=True)
        module.adapter = LoRA(a, b, magnitude, scale=scale, dropout=config.dropout, name=name)


def targets(config: AdapterConfig, names: Collection[str]) -> dict[str, tuple[int, float]]:
    """Return (rank, alpha) of each of the adaptable `names` that the config chooses, by name.

    Raises UserError for a pattern that matches none.
    """
    chosen: set[str] = set()
    for pattern in [config.targets] if isinstance(config.targets, str) else config.targets:
        matching = [name for one in PRESETS.get(pattern, (pattern,)) for name in _matching(one, names)]
        if not matching:
            raise UserError(f"targets: {pattern!r} matches nothing{did_you_mean(pattern, [*PRESETS, *names])}")
        chosen.update(matching)
    sizes = {name: (config.rank, config.alpha) for name in names if name in chosen}
    for pattern, other in config.patterns.items():
        if not (matching := _matching(pattern, sizes)):
            raise UserError(f"patterns: {pattern!r} matches none of the targets{did_you_mean(pattern, list(sizes))}")
        for name in matching:
            rank, alpha = sizes[name]
            sizes[name] = (other.rank or rank, other.alpha or alpha)
    return sizes


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    return [name for name in names if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(f"{name}.kernel", pattern)]


def config_targets(config: AdapterConfig, model: FamilyConfig) -> dict[str, tuple[int, float]]:
    """Return `targets` of a model that need not be built."""
    return targets(config, adaptable(abstract_model(model)))


def adapted(model: nnx.Module) -> Iterator[tuple[str, Module]]:
    """Yield (name, module) for each module that has an adapter."""
    return ((name, module) for name, module in adaptable(model).items() if module.adapter is not None)


def with_magnitudes(model: nnx.Module) -> None:
    """Set DoRA's magnitudes, in place, to the lengths of the columns of the frozen weights."""
    for _, module in adapted(model):
        if isinstance(module.adapter, LoRA) and module.adapter.magnitude is not None:
            wide = dense(weight_of(module).get_value(), jnp.float32)
            module.adapter.magnitude.set_value(jnp.sqrt(jnp.sum(jnp.square(wide), axis=-2)))
