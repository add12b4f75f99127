"""What an asynchronous save costs the steps around it: python benchmarks/saving.py [--rounds N] [--model NAME]

The quickstart, and a Llama of 58 million parameters (d 512, 8 layers, vocabulary 32,000; 4 rows of 512 tokens). Blocks
of steps with a save at their start, and without, in turn; a block ends when its last step is done, and the save is
given until then. Prints the seconds that a save adds to its block, of which some the loop waits for the copy, and what
that is of the time between saves: the quickstart's 100 steps, and 1,000 steps (the default) of the other. Exits 1 where
it is more than 5%.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

MOST = 0.05
SMALL = """
name: small
model: {preset: tiny, vocab_size: 32000, hidden_size: 512, intermediate_size: 1376, num_layers: 8, num_heads: 8,
        num_kv_heads: 8, head_dim: 64, tie_embeddings: false}
data: {sequence_length: 512}
train: {global_batch_size: 4, scan_layers: false}
"""
MODELS = {"quickstart": (None, 24), "58M": (SMALL, 6)}
"""Recipe, and steps of a block."""


def measure(name: str, rounds: int) -> bool:
    import jax

    from trainfw import build_program, load_recipe
    from trainfw.checkpoint import Checkpoints

    text, steps = MODELS[name]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        if text is not None:
            path.write_text(text)
        recipe = load_recipe("quickstart" if text is None else path)
        program = build_program(recipe, jax.devices()[:1])
        step, state = program.compile_train_step(), program.init()
        batch = program.shard_batch(random_batch(recipe))
        checkpoints = Checkpoints(Path(directory) / "checkpoints", recipe.checkpoint)
        number, blocks, waits = 0, {True: [], False: []}, []
        for turn in range(2 * rounds + 2):
            saves = turn % 2 == 1
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            start = time.monotonic()
            if saves:
                number += 1
                rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
                checkpoints.save(number, state.params, rest, {})
                waits.append(time.monotonic() - start)
            for _ in range(steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            if turn > 1:  # the first of each warms up
                blocks[saves].append(time.monotonic() - start)
            checkpoints.wait()
        checkpoints.close()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))
    plain, saving = statistics.median(blocks[False]), statistics.median(blocks[True])
    every = recipe.checkpoint.every
    cost = (saving - plain) / (every * plain / steps)
    print(
        f"{name}: {size / 1e6:,.0f} MB; {plain / steps:.3f} s a step; a save adds {saving - plain:+.2f} s to {steps} "
        f"steps of {plain:.2f} s (the loop waits {statistics.median(waits[1:]):.2f} s): "
        f"{cost:.2%} at one in {every:,} steps (at most {MOST:.0%}); "
        f"{rounds} rounds, {min(blocks[False]):.2f} to {max(blocks[False]):.2f} s without and "
        f"{min(blocks[True]):.2f} to {max(blocks[True]):.2f} s with"
    )
    return cost <= MOST


def random_batch(recipe):
    import numpy as np

    shape = (recipe.train.global_batch_size, recipe.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, shape, np.int32)
    return {
        "tokens": tokens,
        "targets": tokens,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "loss_mask": np.ones(shape, np.float32),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=list(MODELS))
    arguments = parser.parse_args()
    names = [arguments.model] if arguments.model else list(MODELS)
    good = [measure(name, arguments.rounds) for name in names]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
