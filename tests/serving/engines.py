"""Engines of tiny models that are drawn, not loaded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.models import ModelConfig, ModelOptions, Transformer, dense
from trainfw.program import ServerShape, build_server, place_weights, serving_recipe
from trainfw.serving import SlotEngine
from trainfw.serving.adapters import AdapterPlaces
from trainfw.weights import kept_weight, map_named, named

VOCABULARY = 96
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "init_std": 0.2,
}
GEMMA = DENSE | {
    "tie_embeddings": True,
    "layer_pattern": ["sliding", "global"],
    "sliding_window": 7,
    "rope_local_theta": 100.0,
    "attention_softcap": 5.0,
    "final_softcap": 8.0,
    "qk_norm": True,
    "post_norms": True,
    "zero_centered_norm": True,
    "scale_embeddings": True,
}
MOE = DENSE | {"moe": {"num_experts": 4, "experts_per_token": 2}}


@functools.cache
def drawn(kind: str) -> Transformer:
    config = ModelConfig(**{"dense": DENSE, "gemma": GEMMA, "moe": MOE}[kind])
    return Transformer(config, ModelOptions(), rngs=nnx.Rngs(0))


def engine_of(
    model: Transformer,
    *,
    weights: str = "float32",
    layout: dict[str, int] | None = None,
    scan_layers: bool = False,
    queue: int = 64,
    **shape: Any,
) -> tuple[SlotEngine, Transformer]:
    """An engine of a model, and the model with its weights as the engine keeps them."""
    size = int(np.prod(list((layout or {}).values())))
    recipe = serving_recipe(
        model.config, weights=weights, compute_dtype="float32", layout=layout, scan_layers=scan_layers
    )
    sizes = {"slots": 4, "length": 64, "chunk": 8, "cache": "float32"} | shape
    server = build_server(recipe, ServerShape(**sizes), jax.devices()[:size])
    state = nnx.to_pure_dict(nnx.state(model))
    arrays = dict(named(state))
    params = place_weights(server, lambda name, like: jax.device_put(arrays[name], like.sharding))
    kept = map_named(lambda name, x: dense(kept_weight(name, x, recipe), jnp.float32), state)
    places = AdapterPlaces(server, params, base=None, path="drawn") if server.shape.adapters else None
    return SlotEngine(server, params, places, queue=queue), nnx.merge(nnx.graphdef(model), nnx.State(kept))


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, VOCABULARY, random.integers(1, longest + 1)).tolist() for _ in range(count)]
