"""What checkpoints cost: python benchmarks/checkpoint.py [--rounds N] [--model NAME] [--json FILE] [--save]

The quickstart, and a Llama of 58 million parameters (d 512, 8 layers, vocabulary 32,000; 4 rows of 512 tokens).

- A save with the device idle: how long the loop is blocked (until `save` returns), and until the checkpoint is on disk
  with its checksums; beside a plain write of as many bytes into one file, with and without fsync (Orbax does none), all
  measured in turn. Then the checksums read again, as every resumed run does, and the restore, beside a plain read; all
  of it is in the page cache by then.
- A save with steps going on: blocks of steps with a save at their start, and without, in turn; a block ends when its
  last step is done, and the save is given until then. The seconds that a save adds to its block, and what that is of
  the time between saves: the quickstart's 100 steps, and 1,000 steps (the default) of the other.

Exits 1 where the latter is more than 5%.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_most, finish, positive, say, table

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
OPERATIONS = (
    "save: the loop is blocked",
    "save: until on disk",
    "plain write",
    "plain write, fsync",
    "checksums",
    "restore",
    "plain read",
)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Seconds: of each operation's rounds, and of blocks of steps with and without a save."""
    import jax

    from trainfw import build_program, load_recipe
    from trainfw.backends import keep_freed_memory
    from trainfw.checkpoint import Checkpoints

    keep_freed_memory()  # as a run does
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
        blocks: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * rounds + 2):
            saves = number % 2 == 1
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            start = time.monotonic()
            if saves:
                checkpoints.save(number, state.params, rest_of(state), {})
            for _ in range(steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            if number > 1:  # the first of each warms up
                blocks[saves].append(time.monotonic() - start)
            checkpoints.wait()
        say(f"{name}: steps done")
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, rest_of(state))))
        alone = measure_alone(checkpoints, state, program.abstract_state, size, number + 1, rounds, Path(directory))
        checkpoints.close()
    return {"bytes": size, "steps": steps, "every": recipe.checkpoint.every, "blocks": blocks, "alone": alone}


def rest_of(state: Any) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def measure_alone(
    checkpoints: Any, state: Any, abstract: Any, size: int, first: int, rounds: int, directory: Path
) -> dict[str, list[float]]:
    """Seconds of each operation, with the device idle, in turn."""
    import jax
    import numpy as np

    found: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    data = np.random.default_rng(0).bytes(size)
    plain = directory / "plain"

    def timed(name: str, function: Callable[[], Any]) -> None:
        start = time.monotonic()
        jax.block_until_ready(function())
        found[name].append(time.monotonic() - start)

    def save(number: int) -> None:
        start = time.monotonic()
        checkpoints.save(number, state.params, rest_of(state), {})
        found[OPERATIONS[0]].append(time.monotonic() - start)
        checkpoints.wait()

    def write(sync: bool) -> None:
        plain.unlink(missing_ok=True)
        with plain.open("wb") as file:
            file.write(data)
            if sync:
                os.fsync(file.fileno())

    for number in range(first, first + rounds + 1):
        os.sync()  # what was written before is not in the way
        timed("save: until on disk", lambda number=number: save(number))
        os.sync()
        timed("plain write", lambda: write(False))
        timed("plain write, fsync", lambda: write(True))
        timed("checksums", lambda: checkpoints.newest_whole(say))
        timed("restore", lambda number=number: checkpoints.restore(number, abstract.params, rest_of(abstract))[:2])
        timed("plain read", lambda: len(plain.read_bytes()))
    return {name: seconds[1:] for name, seconds in found.items()}  # the first warms up


def random_batch(recipe: Any) -> dict[str, Any]:
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


def judge(found: dict[str, dict[str, Any]]) -> tuple[list[Table], list[Check]]:
    tables, checks, costs = [], [], []
    for name, one in found.items():
        rows = []
        for operation, seconds in one["alone"].items():
            middle = statistics.median(seconds)
            rows.append([operation, middle, min(seconds), max(seconds), one["bytes"] / middle / 1e9])
        title = f"{name}: {one['bytes'] / 1e6:,.0f} MB of state, the device idle"
        tables.append(table(title, ["operation", "seconds", "least", "most", "GB/s"], rows))
        plain, saving = (statistics.median(one["blocks"][saves]) for saves in (False, True))
        share = (saving - plain) / (one["every"] * plain / one["steps"])
        costs.append([name, plain / one["steps"], one["steps"], saving - plain, one["every"], f"{share:.2%}"])
        checks.append(at_most(f"{name}: share of the time that saving takes", share, MOST))
    columns = ["model", "seconds a step", "steps of a block", "seconds a save adds", "steps between saves", "share"]
    return [*tables, table("A save with steps going on", columns, costs)], checks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--model", choices=list(MODELS))
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    names = [chosen.model] if chosen.model else list(MODELS)
    return finish("checkpoint", *judge({name: measure(name, chosen.rounds) for name in names}), chosen)


if __name__ == "__main__":
    raise SystemExit(main())
