"""Plans of this machine beside what it does: predicted and measured step times of real programs on its CPU.

    python benchmarks/plan_here.py [--hardware FILE.yaml] [--steps N]

Measures the machine (benchmarks/machine.py; some minutes), or takes FILE that it wrote, plans two recipes on it and
runs N steps of each, on random tokens. Errors are of the least time, as rates are the best: what else the machine does
is in neither. Exit 1 where one is more than 20%.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import positive, readable
from trainfw import Recipe, backends, load_recipe, planning

WITHIN = 0.20
SIXTY_MILLION = (
    "name=60M",
    "model={vocab_size: 16384, hidden_size: 512, intermediate_size: 1792, num_layers: 12, tie_embeddings: false, "
    "num_heads: 8, num_kv_heads: 4, head_dim: 64}",
    "data.sequence_length=512",
    "train={global_batch_size: 4, scan_layers: true}",
    "optimizer={name: adamw, learning_rate: 3.0e-4}",
)
"""Overrides of the quickstart: 59M parameters, 2,048 tokens a step."""


def measured(recipe: Recipe, steps: int) -> tuple[float, float]:
    """Least and median seconds of a step, of `steps` after the first."""
    import jax
    import numpy as np

    from trainfw.program import build_program

    program = build_program(recipe, jax.devices()[:1])
    step, state = program.compile_train_step(), program.init()
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, program.abstract_batch["tokens"].shape)
    arrays = {
        name: tokens if name in ("tokens", "targets") else np.ones_like(tokens) for name in program.abstract_batch
    }
    batch = program.shard_batch({name: a.astype(program.abstract_batch[name].dtype) for name, a in arrays.items()})
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return min(times[1:]), statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", type=readable, help="what benchmarks/machine.py wrote on this machine")
    parser.add_argument("--steps", type=positive, default=8)
    chosen = parser.parse_args()
    backends.prepare(1)
    with tempfile.TemporaryDirectory() as directory:
        file = chosen.hardware or Path(directory) / "here.yaml"
        if chosen.hardware is None:
            from machine import measure

            def say(text: str) -> None:
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

            file.write_text(yaml.safe_dump(measure(("float32",), say)))
            say("")
        worst = 0.0
        for overrides in ((), SIXTY_MILLION):
            recipe = load_recipe("quickstart", [*overrides, f"hardware.topology={file}"])
            predicted = planning.plan(recipe).time
            least, median = measured(recipe, chosen.steps)
            error = predicted.seconds / least - 1
            worst = max(worst, abs(error))
            print(
                f"{recipe.name:12} predicted {predicted.seconds:.3f} s ({predicted.low:.3f} to {predicted.high:.3f}), "
                f"measured {least:.3f} s (median {median:.3f}): {error:+.1%}",
                flush=True,
            )
    return int(worst > WITHIN)


if __name__ == "__main__":
    raise SystemExit(main())
