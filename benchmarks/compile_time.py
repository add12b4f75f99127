"""How the compile time of a step grows with its layers: python benchmarks/compile_time.py [--repeats N]

A llama-like model of LAYERS scanned layers on 64 simulated devices (fsdp 16 * tensor 4), traced and compiled in a
process of its own each time, shallow and deep in turn; the least time of each counts. Exits 1 where the deep one takes
over 10% longer, or more than 4 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import positive

LAYERS = (8, 80)
MOST_GROWTH, MOST_GB = 1.10, 4.0
RECIPE = """
name: compile-time
model: {preset: llama3.2-1b, num_layers: LAYERS}
data: {sequence_length: 2048}
train: {global_batch_size: 32, compute_dtype: bfloat16, remat: full}
parallel: {fsdp: 16, tensor: 4}
"""


def compile_once(num_layers: int) -> None:
    """Print the seconds."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from trainfw import backends, build_program, load_recipe

    backends.prepare(64)
    import jax

    jax.devices()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        path.write_text(RECIPE.replace("LAYERS", str(num_layers)))
        recipe = load_recipe(path)
    start = time.monotonic()
    build_program(recipe).compile_train_step()
    print(time.monotonic() - start)


def measure(num_layers: int) -> tuple[float, float]:
    """(seconds, peak GB) of a process that compiles so many layers."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--layers", str(num_layers)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(1)
    return float(output), usage.ru_maxrss * 1024 / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layers is not None:
        compile_once(arguments.layers)
        return 0
    print(f"{os.cpu_count()} CPUs\nlayers  seconds  peak GB")
    best: dict[int, tuple[float, float]] = {}
    for _ in range(arguments.repeats):
        for num_layers in LAYERS:
            seconds, peak = measure(num_layers)
            print(f"{num_layers:6}  {seconds:7.2f}  {peak:7.2f}", flush=True)
            before = best.get(num_layers, (seconds, 0.0))
            best[num_layers] = min(before[0], seconds), max(before[1], peak)
    growth = best[LAYERS[1]][0] / best[LAYERS[0]][0]
    peak = max(peak for _, peak in best.values())
    print(f"{LAYERS[1]} layers take {growth:.2f} times as long as {LAYERS[0]}, and {peak:.2f} GB at most")
    return int(growth > MOST_GROWTH or peak > MOST_GB)


if __name__ == "__main__":
    raise SystemExit(main())
