"""What more devices and more layers cost: python benchmarks/scaling.py [--steps N] [--repeats N] [--save]

A Llama of 5 million parameters in f32 on simulated devices, each measurement in a process of its own, without caches;
the median of the repeats counts, which take turns.

Weak scaling: every device has 8 rows of 256 tokens, so the work grows with the devices. They share this machine's
cores: what counts is the processor time (user and system) of a step per token, which would not grow if a device's work
did not depend on how many there are. `fsdp` shards parameters, gradients and optimizer; under `data` every device has
the parameters whole, and updates its share of them (docs/parallelism.md). Depth: the same model with 4 to 80 scanned
layers, on one device.

Exits 1 where a token takes 15% more processor time on 16 devices (fsdp) than on one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import Check, Table, add_arguments, at_most, finish, positive, say, table

MOST_GROWTH = 0.15
DEVICES = (1, 2, 4, 8, 16)
LAYERS = (4, 20, 80)
LAYOUTS = ("fsdp", "data")
ROWS = 8
"""Of each device."""
RECIPE = """
name: scaling
model: {preset: tiny, vocab_size: 2048, hidden_size: 256, intermediate_size: 512, num_layers: 6, num_heads: 4,
        num_kv_heads: 4, head_dim: 64, tie_embeddings: false}
data: {sequence_length: 256}
train: {global_batch_size: 8}
"""
DEEP_ROWS = 2
"""Of the deep models' one device."""


def child(devices: int, steps: int, overrides: Sequence[str]) -> None:
    """Print the seconds of compiling and of a step, and the processor's of a step."""
    from trainfw import backends

    backends.prepare(devices)
    import jax

    from benchmarks.checkpoint import random_batch
    from trainfw import build_program, load_recipe

    backends.keep_freed_memory()  # as a run does
    jax.devices()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "recipe.yaml"
        path.write_text(RECIPE)
        recipe = load_recipe(path, overrides)
    start = time.monotonic()
    program = build_program(recipe)
    step = program.compile_train_step()
    compiled = time.monotonic() - start
    state, batch = program.init(), program.shard_batch(random_batch(recipe))
    for turn in range(2):  # the first warms up
        jax.block_until_ready((state, batch))
        start, before = time.monotonic(), os.times()
        for _ in range(steps if turn else 1):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        wall, after = time.monotonic() - start, os.times()
    system = after.system - before.system
    processor = after.user - before.user + system
    found = {"compile": compiled, "wall": wall / steps, "processor": processor / steps, "system": system / steps}
    print(json.dumps(found | {"tokens": program.tokens_per_step, "parameters": program.num_parameters}))


def measure(devices: int, steps: int, *overrides: str) -> dict[str, Any]:
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, "--child", str(devices), str(steps), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}{devices} devices, {' '.join(overrides)}: failed")
    found = json.loads(done.stdout.splitlines()[-1])
    say(f"{devices} devices, {' '.join(overrides)}: {found}")
    return found


def judge(
    weak: dict[str, dict[int, dict[str, Any]]], deep: dict[int, dict[str, Any]]
) -> tuple[list[Table], list[Check]]:
    rows = []
    growth = {}
    for layout, by_devices in weak.items():
        first = by_devices[min(by_devices)]
        for devices, one in by_devices.items():
            growth[layout, devices] = one["processor"] / one["tokens"] * first["tokens"] / first["processor"] - 1
            per_token = one["processor"] / one["tokens"] * 1e6
            shown, system = f"{growth[layout, devices]:+.1%}", one["system"] / one["processor"]
            rows.append(
                [
                    layout,
                    devices,
                    one["tokens"],
                    one["wall"],
                    one["processor"],
                    f"{system:.0%}",
                    per_token,
                    shown,
                    one["compile"],
                ]
            )
    columns = ["layout", "devices", "tokens a step", "seconds a step", "processor seconds a step", "of it the system's"]
    columns += ["processor µs a token", "growth", "seconds to compile"]
    depth = [[layers, one["parameters"], one["wall"], one["compile"]] for layers, one in deep.items()]
    most = max(devices for _, devices in growth)
    return [
        table("Weak scaling", columns, rows),
        table("Depth", ["layers", "parameters", "seconds a step", "seconds to compile"], depth),
    ], [at_most(f"growth of a token's processor time, {most} devices, fsdp", growth["fsdp", most], MOST_GROWTH)]


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        child(int(given[1]), int(given[2]), given[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=positive, default=1, help="on 16 devices; fewer devices take more, up to 8 times as many"
    )
    parser.add_argument("--repeats", type=positive, default=3)
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    weak: dict[str, dict[int, list[dict[str, Any]]]] = {layout: {n: [] for n in DEVICES} for layout in LAYOUTS}
    deep: dict[int, list[dict[str, Any]]] = {layers: [] for layers in LAYERS}
    for _ in range(chosen.repeats):
        for devices in DEVICES:
            for layout in LAYOUTS:
                sizes = (f"train.global_batch_size={ROWS * devices}", f"parallel.{layout}={devices}")
                steps = chosen.steps * min(8, max(DEVICES) // devices)
                weak[layout][devices].append(measure(devices, steps, *sizes))
        for layers in LAYERS:
            sizes = (f"model.num_layers={layers}", f"train.global_batch_size={DEEP_ROWS}")
            deep[layers].append(measure(1, 2 * chosen.steps, *sizes))
    middle = {layout: {n: _middle(found) for n, found in of.items()} for layout, of in weak.items()}
    tables, checks = judge(middle, {layers: _middle(found) for layers, found in deep.items()})
    return finish("scaling", tables, checks, chosen)


def _middle(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


if __name__ == "__main__":
    raise SystemExit(main())
