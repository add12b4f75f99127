"""Do the same recipes train to the same bits? python benchmarks/bits.py [--out FILE] [--compare FILE] [--filter TEXT]

Trains small recipes for three steps on random batches, on layouts of up to 8 simulated devices, and prints a hash of
each one's parameters. Run it before a change with --out, and after it with --compare on the same machine and versions:
exits 1 where a hash differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import yaml

from benchmarks.parity import MODELS
from benchmarks.reporting import readable, say, writable
from tests.helpers import random_batches
from trainfw import Recipe, backends, build_program, load_recipe

STEPS, DEVICES = 3, 8
LORA = {"rank": 4, "targets": "all-linear"}

ROWS: dict[str, dict[str, Any]] = {
    "dense, one device": {"model": "llama"},
    "accumulation, unrolled, bf16": {
        "model": "llama",
        "train": {"accumulation_steps": 2, "scan_layers": False, "compute_dtype": "bfloat16", "remat": "full"},
    },
    "fsdp 8": {"model": "llama", "parallel": {"fsdp": 8}, "train": {"remat": "full"}},
    "fsdp 8, unrolled": {
        "model": "llama",
        "parallel": {"fsdp": 8},
        "train": {"remat": "full", "scan_layers": False, "accumulation_steps": 2},
    },
    "fsdp x tensor x data": {
        "model": "gemma",
        "parallel": {"fsdp": 2, "tensor": 2, "data": 2},
        "train": {"remat": "dots", "z_loss": 0.01, "loss_chunk": 8},
    },
    "ZeRO-2, Muon": {
        "model": "llama",
        "parallel": {"fsdp": 4, "data": 2, "fsdp_shards": "gradients"},
        "train": {"accumulation_steps": 2},
        "optimizer": {"name": "muon"},
    },
    "ring x tensor": {"model": "llama", "parallel": {"context": 4, "tensor": 2}},
    "gathered context, Lion": {
        "model": "gemma",
        "parallel": {"context": 4, "fsdp": 2, "context_attention": "gathered"},
        "optimizer": {"name": "lion"},
    },
    "pipeline, interleaved": {
        "model": "llama",
        "parallel": {"pipeline": 2, "interleave": 2, "fsdp": 2, "tensor": 2},
        "train": {"remat": "full"},
    },
    "experts, one device": {"model": "mixtral"},
    "experts x fsdp x tensor": {"model": "mixtral", "parallel": {"expert": 2, "fsdp": 2, "tensor": 2}},
    "dropless experts, pipeline": {"model": "deepseek", "parallel": {"pipeline": 2, "data": 2, "expert": 2}},
    "adapter, one device": {"model": "llama", "adapter": LORA | {"dropout": 0.1}},
    "adapter, fsdp x tensor": {"model": "gemma", "adapter": LORA, "parallel": {"fsdp": 4, "tensor": 2}},
    "DoRA on 8 bits": {"model": "llama", "adapter": LORA | {"kind": "dora", "base": "int8"}, "parallel": {"fsdp": 4}},
    "fp8": {"model": "llama", "parallel": {"fsdp": 4}, "train": {"matmul_dtype": "fp8"}},
    "guard": {"model": "llama", "faults": {"non_finite": "skip", "spike_sigma": 6.0}},
}


def recipe_of(row: dict[str, Any], directory: Path) -> Recipe:
    tree: dict[str, Any] = {
        "name": "bits",
        **row,
        "model": MODELS[row["model"]],
        "data": {"sequence_length": 32},
        "train": {"global_batch_size": 16, "steps": STEPS, **row.get("train", {})},
        "parallel": {"fsdp": 1, **row.get("parallel", {})},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


def hash_of(recipe: Recipe) -> str:
    """A hash of the parameters after `STEPS` steps, and of what the steps measured."""
    import jax

    parallel = recipe.parallel
    count = parallel.pipeline * parallel.data * parallel.fsdp * parallel.expert * parallel.context * parallel.tensor
    program = build_program(recipe, jax.devices()[:count])
    state = program.init()
    digest = hashlib.sha256()
    for batch in random_batches(recipe, STEPS):
        state, metrics = program.train_step(state, program.shard_batch(batch))
        for name in sorted(metrics):
            digest.update(f"{name} {metrics[name].value()!r} ".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=writable, metavar="FILE", help="write the hashes to this file")
    parser.add_argument("--compare", type=readable, metavar="FILE", help="hashes that these must equal")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only rows whose name contains this")
    arguments = parser.parse_args()
    backends.prepare(DEVICES)
    before = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, row in ROWS.items():
            if arguments.filter not in name:
                continue
            hashes[name] = hash_of(recipe_of(row, Path(directory)))
            verdict = {None: "", hashes[name]: "equal"}.get(before.get(name), f"was {before.get(name)}")
            print(f"{name:32} {hashes[name]}  {verdict}".rstrip(), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(hashes, indent=1) + "\n")
    differing = [name for name in hashes if before.get(name, hashes[name]) != hashes[name]]
    say(f"{len(hashes)} rows, {len(differing)} differ" if before else f"{len(hashes)} rows")
    return int(bool(differing) or not hashes)


if __name__ == "__main__":
    raise SystemExit(main())
