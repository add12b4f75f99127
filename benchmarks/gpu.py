"""Recipes on one GPU: the share of its peak that they use, and Transformers with torch.compile beside them.

    python benchmarks/gpu.py [--recipes h100-1.3b,h100-350m,h100-8b-lora] [--steps N] [--set KEY=VALUE ...] [--no-peer]

The program of each recipe is stepped on random tokens. MFU: the model's FLOPs of a step (`Program.flops_per_step`: the
causal half of attention only, nothing that remat does again) over the time and the card's dense bfloat16 peak. Beside
h100-1.3b the same model, batch and dtypes in Transformers (random weights, SDPA, fused AdamW, autocast), compiled, in
the largest microbatch of those tried that the memory takes. One after the other: both want the card's memory.

Exit 1 where h100-1.3b has less than 55% or is less than 1.3 times as fast as Transformers, 2 without a GPU of CUDA's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from side_by_side.driver import Record, Worker
from side_by_side.environments import Unavailable

from benchmarks.reporting import Check, add_arguments, at_least, finish, positive, say, table
from trainfw import Recipe, load_recipe
from trainfw.hardware import load_topology
from trainfw.paths import cache_dir

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
NAMES = ("h100-1.3b", "h100-350m", "h100-8b-lora")
CHECKED, LEAST_MFU, TIMES_PEER = "h100-1.3b", 0.55, 1.3
MICROBATCHES = (4, 2)
"""Rows that Transformers is tried with, largest first, until one fits."""
BATCHES = 2


def card() -> str | None:
    """What nvidia-smi calls the first GPU."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip().splitlines()[0]


class Bench:
    def __init__(self, directory: Path, steps: int, memory_fraction: float | None):
        self.directory, self.steps, self.memory_fraction = directory, steps, memory_fraction

    def run(self, name: str, script: str, work: dict[str, Any], **variables: str) -> Record:
        """Raises Unavailable."""
        file = self.directory / f"{name}.json"
        (self.directory / name).mkdir(exist_ok=True)
        file.write_text(json.dumps({"directory": str(self.directory / name), "dtype": "bfloat16", **work}))
        log = cache_dir() / "peers" / "logs" / f"gpu-{name}.log"
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
        command = [sys.executable, str(HERE / "side_by_side" / "workers" / script), str(file)]
        worker = Worker(name, command, {**os.environ, **environment}, log, timeout=600)
        try:
            say(f"{name}: starting")
            worker.start()
            say(f"{name}: first step {worker.record.first_step:.0f} s after its start")
            worker.turn(self.steps)
        finally:
            worker.stop()
        say(f"{name}: {', '.join(f'{s:.3f}' for s in worker.record.seconds)} s a step")
        return worker.record

    def batches(self, name: str, recipe: Recipe) -> Path:
        import numpy as np

        file = self.directory / f"{name}-batches.npz"
        shape = BATCHES, recipe.train.global_batch_size, recipe.data.sequence_length + 1
        rows = np.random.default_rng(0).integers(0, recipe.model.vocab_size, shape, dtype=np.int32)
        np.savez(file, rows=rows)
        return file

    def ours(self, name: str, recipe: Recipe, overrides: Sequence[str]) -> Record:
        work = {
            "recipe": str(RECIPES / f"{name}.yaml"),
            "overrides": list(overrides),
            "batches": str(self.batches(name, recipe)),
            "length": recipe.data.sequence_length,
        }
        fraction = {} if self.memory_fraction is None else {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(self.memory_fraction)}
        return self.run(name, "on_trainfw.py", work, **fraction)

    def transformers(self, name: str, recipe: Recipe) -> tuple[Record, int]:
        """And the rows of its microbatches. Raises Unavailable with the last failure where none fits."""
        model, optimizer = recipe.model, recipe.optimizer
        work = {
            "config": {
                "vocab_size": model.vocab_size,
                "hidden_size": model.hidden_size,
                "intermediate_size": model.intermediate_size,
                "num_hidden_layers": model.num_layers,
                "num_attention_heads": model.num_heads,
                "num_key_value_heads": model.num_kv_heads,
                "head_dim": model.head_dim,
                "max_position_embeddings": recipe.data.sequence_length,
                "rms_norm_eps": model.norm_eps,
                "tie_word_embeddings": model.tie_embeddings,
            },
            "optimizer": {
                "learning_rate": optimizer.learning_rate,
                "weight_decay": optimizer.weight_decay,
                "b1": optimizer.b1,
                "b2": optimizer.b2,
                "epsilon": optimizer.epsilon,
                "clip_norm": optimizer.clip_norm,
            },
            "rows": recipe.train.global_batch_size,
            "batches": str(self.batches(name, recipe)),
            "device": "cuda",
            "compile": True,
        }
        problem = Unavailable("no microbatch was tried")
        for rows in MICROBATCHES:
            try:
                more = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
                return self.run(f"transformers-{rows}", "on_transformers.py", work | {"microbatch": rows}, **more), rows
            except Unavailable as found:
                say(f"Transformers in microbatches of {rows}: {found}")
                problem = found
        raise problem


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(NAMES), help=f"names with commas between, of {', '.join(NAMES)}")
    parser.add_argument("--steps", type=positive, default=8, help="timed steps of each (8)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipes")
    parser.add_argument(
        "--memory-fraction", type=float, metavar="F", help="of the card's memory for trainfw: a larger card as an H100"
    )
    parser.add_argument("--no-peer", action="store_true", help="without Transformers")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    chosen.names = [name.strip() for name in chosen.recipes.split(",") if name.strip()]
    for name in chosen.names:
        if name not in NAMES:
            parser.error(f"--recipes: unknown recipe {name!r}; expected of {', '.join(NAMES)}")
    return chosen


def row(name: str, how: str, record: Record, tokens: int, flops: float, peak: float) -> list[Any]:
    seconds = statistics.median(record.seconds)
    memory = record.more[-1].get("device_memory")
    return [
        *(name, how, seconds, tokens / seconds, flops / seconds / 1e12, 100 * flops / seconds / peak),
        *(record.first_step, None if memory is None else memory / 1e9, record.losses[0]),
    ]


def measure(
    bench: Bench, name: str, chosen: argparse.Namespace, peak: float, rows: list[list[Any]], checks: list[Check]
) -> None:
    """Adds to `rows` and `checks`. Raises Unavailable."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", chosen.set)
    tokens = recipe.train.global_batch_size * recipe.data.sequence_length
    record = bench.ours(name, recipe, chosen.set)
    flops, seconds = record.more[-1]["model_flops"], statistics.median(record.seconds)
    rows.append(row(name, "trainfw", record, tokens, flops, peak))
    if name != CHECKED:
        return
    checks.append(at_least(f"{name}: MFU", flops / seconds / peak, LEAST_MFU))
    if not chosen.no_peer:
        peer, size = bench.transformers(name, recipe)
        who = ", ".join(f"{package} {version}" for package, version in peer.versions.items())
        rows.append(row(name, f"{who}, {size} rows at a time", peer, tokens, flops, peak))
        times = statistics.median(peer.seconds) / seconds
        checks.append(at_least(f"{name}: times Transformers with torch.compile", times, TIMES_PEER))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    name = card()
    if name is None:
        say("error: nvidia-smi shows no GPU; these recipes are for one of CUDA's")
        return 2
    peak = load_topology("h100-8").peak_flops("bfloat16")
    say(f"{name}; MFU is of an H100 SXM's {peak / 1e12:.0f} TFLOP/s")
    rows: list[list[Any]] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        bench = Bench(Path(temporary), chosen.steps, chosen.memory_fraction)
        try:
            for recipe_name in chosen.names:
                measure(bench, recipe_name, chosen, peak, rows, checks)
        except (Unavailable, KeyboardInterrupt) as problem:
            say(f"error: {problem or 'stopped'}")  # what was measured before it is told all the same
            checks.append({"name": "all ran", "value": str(problem) or "stopped", "limit": "no failure", "ok": False})
    columns = ["recipe", "who", "s/step", "tokens/s", "TFLOP/s", "MFU, %", "first step, s", "GPU memory, GB", "loss"]
    return finish("gpu", [table(f"One {name}", columns, rows)], checks, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
