"""Any product of mesh axes computes what one device does: python benchmarks/parity.py [--seed N] [--filter TEXT]

Every row is a tiny model on 8 or 16 simulated devices, in f32. Its loss and all its gradients are compared with those
of one device on the same random weights and the same batch of packed, padded rows. The error of an array is
max|a - b| / max|b|, of the bias of keys that do not turn with the values' b. Exits 1 where one exceeds LIMIT.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import yaml

from tests.helpers import random_batches
from trainfw import Recipe, UserError, backends, build_program, load_recipe
from trainfw.errors import did_you_mean
from trainfw.hlo import collectives_of, parse_module
from trainfw.models import ModelConfig
from trainfw.objectives import PREFERENCES
from trainfw.parallel import AXES, ParallelConfig
from trainfw.recipe import TrainConfig

LIMIT = 1e-5
IMAGE_SECTIONS = {"data": {"format": "images", "source": "digits"}, "objective": {"name": "flow_matching"}}
PAIRS = {"pairs_per_row": 3}
DEVICES = 16
"""The most that a row takes."""

DENSE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_layers": 4, "num_heads": 8}
IMAGES = {"family": "dit", "image_size": 16, "channels": 3, "patch_size": 2, "hidden_size": 32, "num_layers": 4}
IMAGES |= {"num_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "num_kv_heads": 2},
    "gemma": {
        **DENSE,
        "num_kv_heads": 4,
        "tie_embeddings": True,
        "layer_pattern": ["sliding", "global"],
        "sliding_window": 7,
        "rope_local_theta": 100.0,
        "attention_softcap": 2.0,
        "final_softcap": 3.0,
        "qkv_bias": True,
        "qk_norm": True,
        "post_norms": True,
        "zero_centered_norm": True,
        "scale_embeddings": True,
        "activation": "gelu_tanh",
    },
    # Slots for every token in every expert: nothing is dropped.
    "mixtral": {
        **DENSE,
        "num_kv_heads": 2,
        "moe": {"num_experts": 8, "experts_per_token": 2, "capacity_factor": 4.0, "balance_loss": 0.1},
    },
    "deepseek": {
        **DENSE,
        "num_kv_heads": 8,
        "tie_embeddings": True,
        "moe": {
            "num_experts": 8,
            "experts_per_token": 3,
            "normalize_weights": False,
            "shared_intermediate_size": 64,
            "dispatch": "dropless",
        },
    },
    "dit": {**IMAGES, "conditioning": "class", "num_classes": 5},
    "pixart": {**IMAGES, "conditioning": "cross", "caption_length": 6, "caption_size": 12},
}
TABLE: dict[str, list[str]] = {
    "llama": [
        "data=8",
        "fsdp=8",
        "fsdp=8 prefetch=false remat=full scan_layers=false",
        "fsdp=8 remat=full",
        "fsdp=8 remat=full scan_layers=false accumulation_steps=2",
        "fsdp=8 fsdp_shards=gradients accumulation_steps=2",
        "fsdp=8 fsdp_shards=optimizer accumulation_steps=2",
        "tensor=2 data=4",
        "tensor=8",  # more than kv heads
        "context=8",
        "context=8 context_attention=gathered",
        "data=2 fsdp=4 remat=dots",
        "fsdp=4 tensor=2 remat=full z_loss=0.01",
        "fsdp=2 tensor=4 scan_layers=false loss_chunk=8",
        "fsdp=4 context=2 remat=full",
        "tensor=2 context=4",
        "data=2 fsdp=2 tensor=2 fsdp_shards=gradients remat=full accumulation_steps=2",
        "fsdp=2 context=2 tensor=2 remat=full accumulation_steps=4",
        "data=2 fsdp=2 context=2 fsdp_shards=optimizer accumulation_steps=2",
        "fsdp=2 context=2 tensor=4 fsdp_shards=gradients context_attention=gathered",
        "data=2 fsdp=2 context=2 tensor=2 remat=full accumulation_steps=2",
        "num_layers=8 pipeline=8",
        "num_layers=8 pipeline=4 interleave=2 remat=full",
        "pipeline=2 fsdp=4 remat=full",
        "pipeline=4 tensor=2 accumulation_steps=2",
        "pipeline=2 context=4 remat=dots",
        "pipeline=2 interleave=2 fsdp=2 tensor=2 remat=full accumulation_steps=2",
        "pipeline=2 data=2 fsdp=2 fsdp_shards=gradients scan_layers=false pipeline_microbatches=4",
        "pipeline=2 fsdp=2 context=2 tensor=2 interleave=2 remat=full",
        "dpo fsdp=8 remat=full",
        "dpo tensor=2 data=4",
        "dpo context=4 fsdp=2",
        "dpo pipeline=2 fsdp=2 tensor=2 remat=full accumulation_steps=2",
        "dpo lora fsdp=4 tensor=2 remat=full",
        "dpo lora context=2 fsdp=4 accumulation_steps=2",
        "dpo fsdp=4 data=2 fsdp_shards=gradients accumulation_steps=2",
        "dpo fsdp=2 context=2 tensor=2 loss_chunk=8",
        "ipo fsdp=2 context=2 tensor=2",
        "simpo fsdp=4 tensor=2 accumulation_steps=2",
        "orpo context=2 tensor=2 data=2",
    ],
    "gemma": [
        "dpo fsdp=4 tensor=2 scan_layers=false",
        "fsdp=8 remat=full",
        "tensor=8 remat=dots",
        "fsdp=4 tensor=2 remat=full scan_layers=false",
        "fsdp=2 context=4 loss_chunk=8",
        "context=4 tensor=2 context_attention=gathered scan_layers=false",
        "data=2 context=2 tensor=2 remat=dots",
        "data=2 fsdp=2 context=2 tensor=2 fsdp_shards=gradients scan_layers=false",
        "pipeline=2 tensor=4 scan_layers=false",
        "pipeline=2 context=2 tensor=2 context_attention=gathered accumulation_steps=2",
    ],
    "mixtral": [
        "dpo fsdp=2 expert=4 remat=full",
        "dpo lora expert=2 tensor=2 context=2",
        "expert=8",
        "fsdp=2 expert=4 remat=full",
        "expert=2 tensor=4 scan_layers=false",
        "expert=4 context=2 remat=dots",
        "data=2 fsdp=2 expert=2 fsdp_shards=gradients accumulation_steps=2",
        "expert=2 context=2 tensor=2 remat=full",
        "pipeline=2 fsdp=2 expert=2 remat=full accumulation_steps=2",
        "fsdp=2 expert=2 context=2 tensor=2 remat=full accumulation_steps=2",
        "pipeline=2 expert=2 context=2 tensor=2 interleave=2",
    ],
    "deepseek": [
        "expert=8",
        "expert=4 tensor=2 scan_layers=false remat=full",
        "pipeline=2 expert=4 interleave=2 remat=full",
        "fsdp=2 expert=2 context=2 context_attention=gathered remat=dots",
        "data=2 fsdp=2 expert=2 tensor=2 fsdp_shards=optimizer accumulation_steps=2",
    ],
    "dit": [
        "data=8",
        "fsdp=8 remat=full",
        "tensor=8 remat=dots",
        "context=8",
        "fsdp=2 context=2 tensor=2 remat=full accumulation_steps=2",
        "fsdp=4 tensor=2 remat=full scan_layers=false",
        "data=2 fsdp=2 tensor=2 fsdp_shards=gradients accumulation_steps=2",
        "pipeline=4 fsdp=2 remat=full",
        "pipeline=2 interleave=2 context=2 tensor=2 accumulation_steps=2",
        "lora fsdp=4 tensor=2 remat=full",
    ],
    "pixart": [
        "fsdp=8 remat=full",
        "tensor=4 context=2",
        "pipeline=2 fsdp=2 tensor=2 remat=full accumulation_steps=2",
        "data=2 fsdp=2 context=2 fsdp_shards=optimizer accumulation_steps=2",
    ],
}


@dataclass(frozen=True)
class Combination:
    model: str
    settings: str
    """Keys of `parallel`, `model` and `train`; the axes that are left out are 1."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.settings}"

    @property
    def devices(self) -> int:
        sizes = (setting.split("=") for setting in self.settings.split() if "=" in setting)
        return math.prod(int(size) for key, size in sizes if key in AXES)

    def recipe(self) -> Recipe:
        return make_recipe(self.model, self.settings.split())


@dataclass(frozen=True)
class Agreement:
    """Of a combination with one device."""

    collectives: str
    """What kinds along which axes."""
    loss: float
    """Relative error; of a mixture of experts, the largest of its and the routers' losses."""
    gradients: dict[str, float]
    """Of each array, by its name."""

    @property
    def worst(self) -> str:
        return max(self.gradients, key=lambda name: nan_last(self.gradients[name]))

    @property
    def ok(self) -> bool:
        return self.loss <= LIMIT and all(error <= LIMIT for error in self.gradients.values())


def nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def combinations() -> list[Combination]:
    return [Combination(model, settings) for model, rows in TABLE.items() for settings in rows]


def matching(text: str) -> list[Combination]:
    """Those of which `text` is a part, as in `16 devices`. Raises UserError where there is none."""
    found = [row for row in combinations() if text in f"{row.name} {row.devices} devices"]
    if not found:
        words = {word for row in combinations() for word in row.name.split()}
        raise UserError(f"--filter {text}: no combination's name contains this{did_you_mean(text, words)}")
    return found


def make_recipe(model: str, settings: Sequence[str]) -> Recipe:
    tree = {
        "name": "parity",
        "model": MODELS[model],
        "data": {"sequence_length": 32},
        **(IMAGE_SECTIONS if "family" in MODELS[model] else {}),
        "train": {"global_batch_size": 16},
        "parallel": {"fsdp": 1},
    }
    for setting in [*settings]:
        if setting in PREFERENCES:
            tree |= {"objective": {"name": setting}, "data": {**tree["data"], "format": "preferences", **PAIRS}}
        elif setting == "lora":
            tree |= {"adapter": {"rank": 4}}
    settings = [setting for setting in settings if "=" in setting]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_recipe(path, [f"{section(setting)}.{setting}" for setting in settings])


def section(setting: str) -> str:
    """Which part of a recipe a `key=value` is of; a word alone is an objective of pairs, or an adapter."""
    if "=" not in setting:
        return "model"
    sections = {"parallel": ParallelConfig, "model": ModelConfig, "train": TrainConfig}
    return next(name for name, config in sections.items() if setting.split("=")[0] in config.model_fields)


@functools.cache
def one_device(model: str, settings: tuple[str, ...], seed: int) -> tuple[Any, Any, dict[str, float], Any]:
    """((parameters, what is frozen), batch, metrics, gradients by name), of layers scanned and all rows at once."""
    import jax

    recipe = make_recipe(model, settings)
    program = build_program(recipe, jax.devices()[:1])
    rng = np.random.default_rng(seed)

    def disturbed(x: Any) -> np.ndarray:  # so that biases are not 0, nor scales 1
        return np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32)

    state = program.init()
    params = jax.tree.map(disturbed, state.params)
    # The last layer of a model of images is zero at first, and with it all gradients of an adapter.
    frozen = jax.tree.map(disturbed if "family" in MODELS[model] else np.asarray, state.frozen)
    batch = random_batches(recipe, 1, seed)[0]
    grads, metrics = program.gradients(params, frozen, program.shard_batch(batch))
    means = {name: mean.value() for name, mean in metrics.items()}
    assert means.get("dropped", 0.0) == 0.0
    return (params, frozen), batch, means, by_name(grads)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def compare(combination: Combination, seed: int = 0) -> Agreement:
    import jax

    recipe = combination.recipe()
    same = tuple(s for s in combination.settings.split() if section(s) == "model" or s.startswith("z_loss="))
    (params, frozen), batch, means, gradients = one_device(combination.model, same, seed)
    program = build_program(recipe, jax.devices()[: combination.devices])
    state = program.abstract_state
    compiled = program.gradients.lower(state.params, state.frozen, program.abstract_batch).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.frozen))
    held = np.array(program.layer_order)
    params, *trees = (
        tree | {"layers": jax.tree.map(lambda x: x[held], tree["layers"])} for tree in (params, *frozen.values())
    )
    placed = jax.device_put((params, dict(zip(frozen, trees))), shardings)
    grads, metrics = compiled(*placed, program.shard_batch(batch))
    found = by_name(grads)
    found |= {name: grad[np.argsort(held)] for name, grad in found.items() if name.startswith("layers.")}
    assert found.keys() == gradients.keys()
    along = {
        (collective.kind.removeprefix("collective-"), collective.axes(program.mesh) or ("?",))
        for collective in collectives_of(parse_module(compiled.as_text()))
    }
    return Agreement(
        collectives=", ".join(f"{kind} {'*'.join(axes)}" for kind, axes in sorted(along)),
        loss=max(
            # Differences of log-likelihoods, such as margins, may be about zero, and are as exact as those.
            abs(mean.value() - means[name]) / max(abs(means[name]), abs(means["loss"]))
            for name, mean in metrics.items()
        ),
        gradients={
            name: relative(found[name], gradients[name], beside=gradients[_beside(combination.model, name)])
            for name in found
        },
    )


def _beside(model: str, name: str) -> str:
    """Name the array by whose size an error is measured: its own, but where that is rounding.

    A softmax does not change with a bias of the keys, unless they turn by their positions: its gradient is then zero.
    """
    return name.replace("key.bias", "value.bias") if "family" in MODELS[model] else name


def relative(a: Any, b: Any, *, beside: Any = None) -> float:
    assert np.shape(a) == np.shape(b)
    return float(np.max(np.abs(a - b)) / (np.max(np.abs(b if beside is None else beside)) or 1.0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only rows that contain this, or `16 devices`")
    arguments = parser.parse_args()
    try:
        rows = matching(arguments.filter)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    backends.prepare(DEVICES)
    width = max(len(row.name) for row in rows)
    print(f"{'combination':{width}}  devices  loss     worst gradient                                 collectives")
    agreeing = 0
    for row in rows:
        result = compare(row, arguments.seed)
        agreeing += result.ok
        worst = f"{result.gradients[result.worst]:.1e} {result.worst}"
        print(
            f"{row.name:{width}}  {row.devices:7}  {result.loss:.1e}  {worst:38} {'ok' if result.ok else 'FAIL':6}"
            f"  {result.collectives}",
            flush=True,
        )
    print(f"{agreeing} of {len(rows)} agree (limit {LIMIT:.0e})")
    return int(agreeing < len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
