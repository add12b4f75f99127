"""The limits of this machine: matrix products by shape and dtype, and memory bandwidth.

    python benchmarks/machine.py [--hardware FILE.yaml]

FILE becomes a topology of one device with these rates, for `hardware.topology` of a recipe. Rates are the median of
several runs; the peak of a dtype is the best shape's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml

SHAPES = [
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (2048, 512, 1376),
    (2048, 512, 32000),
]
STREAM_BYTES = 2**28


def seconds(function: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of one call, after one to compile."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(m: int, k: int, n: int, dtype: str) -> float:
    """FLOP/s of (m, k) x (k, n)."""
    left, right = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    product = jax.jit(jnp.matmul)
    return 2.0 * m * k * n / seconds(lambda: product(left, right))


def stream_rate() -> float:
    """Bytes/s of reading and writing an array far larger than the caches, in place: no page is touched anew."""
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    kept = [jnp.ones(STREAM_BYTES // 4, jnp.float32)]

    def step() -> jax.Array:
        kept[0] = add(kept[0])
        return kept[0]

    return 2.0 * STREAM_BYTES / seconds(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", type=Path, help="write the rates to this topology file")
    chosen = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} CPUs, {platform.machine()}, jax {jax.__version__}")
    peaks: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        for m, k, n in SHAPES:
            rate = matmul_rate(m, k, n, dtype)
            peaks[dtype] = max(peaks.get(dtype, 0.0), rate)
            print(f"matmul {dtype:9} ({m}, {k}) x ({k}, {n}): {rate / 1e9:8.1f} GFLOP/s", flush=True)
    bandwidth = stream_rate()
    print(f"read and write {STREAM_BYTES / 1e6:.0f} MB: {bandwidth / 1e9:.1f} GB/s")
    if chosen.hardware:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        source = f"measured by benchmarks/machine.py, {datetime.date.today()}, jax {jax.__version__}"
        figures = {
            "description": f"this machine, {os.cpu_count()} CPUs, as measured",
            "extends": "cpu",
            "chip": {
                "description": f"{os.cpu_count()} CPUs of {platform.machine()} as one device",
                "cores": 1,
                "device_kinds": {1: [device.device_kind]},
                "peak_flops": {
                    dtype: {"value": f"{rate / 1e12:.4f} TFLOP/s", "source": source} for dtype, rate in peaks.items()
                },
                "hbm_size": {"value": f"{memory / 2**30:.1f} GiB", "source": source},
                "hbm_bandwidth": {"value": f"{bandwidth / 1e9:.2f} GB/s", "source": source},
            },
        }
        chosen.hardware.write_text(yaml.safe_dump(figures, sort_keys=False))
        print(f"wrote {chosen.hardware}")


if __name__ == "__main__":
    main()
