"""The limits of this machine: matrix products, elementwise operations, memory bandwidth, and collectives.

    python benchmarks/machine.py [--hardware FILE.yaml] [--json FILE] [--save]

FILE.yaml becomes a topology of one device with these rates, for `hardware.topology` of a recipe. Rates are the best of
several runs, which others on the machine disturb least; the peak of a dtype is the best shape's. Of a product
(m, k) x (k, n) the rate is the mean of the three forms that training has: as it is, with the second operand
transposed, and with the first. Collectives are between simulated devices, threads of one process; their rate is the
bytes of the whole array (what each device hands to an all-reduce or a reduce-scatter, or has of an all-gather) over the
time, whatever the algorithm.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks.reporting import Table, add_arguments, finish, table, writable
from benchmarks.reporting import say as say_beside
from trainfw.hlo import partition
from trainfw.parallel import Layout
from trainfw.planning.read_step.analysis import read

DTYPES = ("float32", "bfloat16")
SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
"""Of each of m, n and k."""
ARRAYS = [2**20, 2**22, 2**24, 2**26]
"""Bytes of the largest array of an elementwise operation."""
STREAM_BYTES = 2**28
DEVICES = (2, 4, 8)
COLLECTIVE_BYTES = (2**20, 2**24)


def seconds(function: Callable[[], Any], repeats: int = 9) -> float:
    """Least time of one call, after one to compile; fewer calls where one takes long."""
    jax.block_until_ready(function())
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1.0:
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def random(*shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)


def matmul_rate(m: int, n: int, k: int, dtype: str) -> float:
    """FLOP/s of (m, k) x (k, n), the mean of its forms."""
    forms = (("mk,kn->mn", (m, k), (k, n)), ("mk,nk->mn", (m, k), (n, k)), ("km,kn->mn", (k, m), (k, n)))
    taken = 0.0
    for form, *shapes in forms:
        left, right = (random(*shape, dtype=dtype) for shape in shapes)
        product = jax.jit(lambda x, y, form=form: jnp.einsum(form, x, y))
        taken += seconds(lambda p=product, x=left, y=right: p(x, y))
    return len(forms) * 2.0 * m * n * k / taken


def matmul_rates(dtype: str, say: Callable[[str], None]) -> list[list[list[float]]]:
    """FLOP/s by [m][n][k] of SIZES; m and n are alike, for one form is the other transposed."""
    found: dict[tuple[int, ...], float] = {}
    for m, n, k in itertools.product(SIZES, repeat=3):
        if m <= n:
            found[m, n, k] = found[n, m, k] = matmul_rate(m, n, k, dtype)
            say(f"matmul {dtype:9} ({m}, {k}) x ({k}, {n}): {found[m, n, k] / 1e9:8.1f} GFLOP/s")
    return [[[round(found[m, n, k]) for k in SIZES] for n in SIZES] for m in SIZES]


def stream_rate() -> float:
    """Bytes/s of reading and writing an array far larger than the caches, in place: no page is touched anew."""
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    kept = [jnp.ones(STREAM_BYTES // 4, jnp.float32)]

    def step() -> jax.Array:
        kept[0] = add(kept[0])
        return kept[0]

    return 2.0 * STREAM_BYTES / seconds(step)


def copy_rate() -> float:
    """Bytes/s of reading and writing in one thread's copy from one array to another, as the host's copies are."""
    source = np.ones(STREAM_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    return 2.0 * STREAM_BYTES / seconds(lambda: np.copyto(target, source))


def collective_rates(devices: int) -> list[tuple[str, int, float]]:
    """(collective, bytes of the whole array, bytes/s) between all devices of this process."""
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    collectives: dict[str, tuple[Callable[[jax.Array], jax.Array], int]] = {
        "all-reduce": (lambda x: jax.lax.psum(x, "x"), devices),
        "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), 1),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), devices),
    }
    found = []
    for size, (name, (function, copies)) in itertools.product(COLLECTIVE_BYTES, collectives.items()):
        array = jax.device_put(np.ones(size // 4 * copies, np.float32), NamedSharding(mesh, P("x")))
        run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False))
        found.append((name, size, size / seconds(lambda f=run, x=array: f(x))))
    return found


def all_collective_rates(say: Callable[[str], None]) -> list[list[Any]]:
    """[collective, devices, bytes, bytes/s], with so many devices in a process of their own each."""
    rows = []
    for devices in DEVICES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, __file__, "--collectives", str(devices)],
            env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, size, rate in json.loads(done.stdout.splitlines()[-1]):
            say(f"{name:14} of {size / 2**20:3.0f} MiB, {devices} devices: {rate / 1e9:6.2f} GB/s")
            rows.append([name, devices, size, rate])
    return rows


def both_ways(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A function and its gradients, each as it is and transposed: the products that follow need one, the gradients of
    their weights the other."""

    def run(*arrays: jax.Array) -> Any:
        result, back = jax.vjp(function, *arrays)
        found = [result, *back(jnp.ones_like(result) if result.ndim == 0 else result)]
        return found, [jnp.swapaxes(x, -1, -2) for x in found if x.ndim > 1]

    return run


def softmax(scores: jax.Array) -> jax.Array:
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen, scores, -1e30))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def gate(x: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(x) * up


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]).mean()


def adam(weight: jax.Array, mean: jax.Array, square: jax.Array, gradient: jax.Array) -> Any:
    mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
    return weight - 1e-3 * mean / (jnp.sqrt(square) + 1e-8), mean, square


def elementwise_rate(size: int, say: Callable[[str], None]) -> float:
    """Bytes/s of what a transformer does beside matrix products, as plans count them, with arrays of `size` bytes."""
    elements = size // 4
    scores, logits, targets = random(elements // 256**2, 256, 256), random(elements // 4096, 4096), elements // 4096
    hidden, wide, weight = random(elements // 256, 256), random(elements // 1024, 1024), random(512, elements // 512)
    parts: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
        "softmax": (both_ways(softmax), (scores,)),
        "norm": (both_ways(norm), (hidden, random(256))),
        "gate": (both_ways(gate), (wide, wide)),
        "cross-entropy": (both_ways(lambda x: cross_entropy(x, jnp.zeros(targets, int))), (logits,)),
        "Adam": (adam, (weight,) * 4),
    }
    moved = taken = 0.0
    for name, (function, arrays) in parts.items():
        jitted = jax.jit(function)
        all_bytes = read(partition(jitted.lower(*arrays)).module, None, Layout()).streamed_bytes()
        each = seconds(lambda f=jitted, a=arrays: f(*a))
        say(f"{name:13} {size / 2**20:4.0f} MiB: {all_bytes / each / 1e9:6.1f} GB/s")
        moved, taken = moved + all_bytes, taken + each
    return moved / taken


def measure(dtypes: Sequence[str] = DTYPES, say: Callable[[str], None] = print) -> dict[str, Any]:
    """This machine's device, as a topology file."""
    device = jax.devices()[0]
    say(f"{device.device_kind}, {os.cpu_count()} CPUs, {platform.machine()}, jax {jax.__version__}")
    rates = {dtype: matmul_rates(dtype, say) for dtype in dtypes}
    elementwise, bandwidth = [elementwise_rate(size, say) for size in ARRAYS], stream_rate()
    for size, rate in zip(ARRAYS, elementwise, strict=True):
        say(f"elementwise operations together, {size / 2**20:.0f} MiB: {rate / 1e9:.1f} GB/s")
    say(f"read and write {STREAM_BYTES / 1e6:.0f} MB: {bandwidth / 1e9:.1f} GB/s")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    source = f"measured by benchmarks/machine.py, {datetime.date.today()}, jax {jax.__version__}"

    def figure(value: str) -> dict[str, str]:
        return {"value": value, "source": source}

    peaks = {dtype: max(rate for plane in cube for row in plane for rate in row) for dtype, cube in rates.items()}
    return {
        "description": f"this machine, {os.cpu_count()} CPUs, as measured",
        "extends": "cpu",
        "chip": {
            "description": f"{os.cpu_count()} CPUs of {platform.machine()} as one device",
            "cores": 1,
            "device_kinds": {1: [device.device_kind]},
            "peak_flops": {dtype: figure(f"{peak / 1e12:.4f} TFLOP/s") for dtype, peak in peaks.items()},
            "matmul_rates": {"sizes": SIZES, "rates": rates, "source": source},
            "hbm_size": figure(f"{memory / 2**30:.1f} GiB"),
            "hbm_bandwidth": figure(f"{bandwidth / 1e9:.2f} GB/s"),
            "elementwise_rates": {"sizes": ARRAYS, "rates": [round(rate) for rate in elementwise], "source": source},
        },
    }


def tables(found: dict[str, Any], copying: float, collectives: list[list[Any]]) -> list[Table]:
    """The result, of a topology and what it does not hold."""
    chip = found["chip"]
    rates = chip["matmul_rates"]["rates"]
    square = [[size, *(rates[dtype][i][i][i] / 1e9 for dtype in rates)] for i, size in enumerate(SIZES)]
    elementwise = chip["elementwise_rates"]
    moved = [
        [f"elementwise, {size / 2**20:.0f} MiB", rate / 1e9]
        for size, rate in zip(elementwise["sizes"], elementwise["rates"])
    ]
    moved.append(
        [f"read and write {STREAM_BYTES / 1e6:.0f} MB in place", float(chip["hbm_bandwidth"]["value"].split()[0])]
    )
    moved.append([f"copy {STREAM_BYTES / 1e6:.0f} MB, one thread", copying / 1e9])
    sizes = [[name, devices, size / 2**20, rate / 1e9] for name, devices, size, rate in collectives]
    return [
        table("Square matrix products, mean of the three forms", ["size", *(f"{d} GFLOP/s" for d in rates)], square),
        table("Memory, read and written", ["what", "GB/s"], moved),
        table("Collectives between simulated devices", ["collective", "devices", "MiB", "GB/s"], sizes),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", type=writable, help="write the rates to this topology file")
    parser.add_argument("--collectives", type=int, help=argparse.SUPPRESS)
    add_arguments(parser)
    chosen = parser.parse_args()
    if chosen.collectives:
        print(json.dumps(collective_rates(chosen.collectives)))
        return 0
    found = measure(say=say_beside)
    if chosen.hardware:
        chosen.hardware.write_text(yaml.safe_dump(found, sort_keys=False, default_flow_style=None))
        say_beside(f"wrote {chosen.hardware}")
    return finish("machine", tables(found, copy_rate(), all_collective_rates(say_beside)), [], chosen)


if __name__ == "__main__":
    raise SystemExit(main())
