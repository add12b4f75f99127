"""The model's matrix products by themselves, in JAX's matmuls or in PyTorch's: about what a step has to take.

Each as an einsum, whatever its library makes of that: a step that lays its operands out better can be faster, as
trainfw's is. All of forward and both gradients, as many of each as the model has; attention's over whole rows, without
the half that a causal kernel may leave out.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from turns import Turns, read_work

TURNS, WORK = Turns(), read_work()
Product = tuple[str, str, tuple[int, ...], tuple[int, ...], int]
"""(name, einsum, one side's shape, the other's, how many)"""


def products() -> list[Product]:
    model, rows, length = WORK["model"], WORK["rows"], WORK["length"]
    layers, width, heads = model["num_layers"], model["hidden_size"], model["num_heads"]
    narrow, wide, head = model["num_kv_heads"] * model["head_dim"], model["intermediate_size"], model["head_dim"]
    found = [
        *_linear("query, output", width, heads * head, 2 * layers),
        *_linear("key, value", width, narrow, 2 * layers),
        *_linear("gate, up", width, wide, 2 * layers),
        *_linear("down", wide, width, layers),
        *_linear("head", width, model["vocab_size"], 1),
    ]
    x, scores = (rows, length, heads, head), (rows, heads, length, length)
    for name, spec, left in (
        ("scores", "bshd,bthd->bhst", x),
        ("mix", "bhst,bthd->bshd", scores),
        ("scores, to mix", "bshd,bthd->bhst", x),
        ("value's gradient", "bhst,bshd->bthd", scores),
        ("query's gradient", "bhst,bthd->bshd", scores),
        ("key's gradient", "bhst,bshd->bthd", scores),
    ):
        found.append((name, spec, left, x, layers))
    return found


def _linear(name: str, fan_in: int, fan_out: int, count: int) -> Iterator[Product]:
    tokens = WORK["rows"] * WORK["length"]
    yield name, "nk,km->nm", (tokens, fan_in), (fan_in, fan_out), count
    yield f"{name}: input's gradient", "nm,km->nk", (tokens, fan_out), (fan_in, fan_out), count
    yield f"{name}: weight's gradient", "nk,nm->km", (tokens, fan_in), (tokens, fan_out), count


def flops(product: Product) -> float:
    _, spec, left, right, count = product
    ins, _ = spec.split("->")
    sizes = dict(zip("".join(ins.split(",")), (*left, *right)))
    return 2.0 * math.prod(sizes.values()) * count


def in_jax() -> Callable[[str, Any, Any], Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    TURNS.say("imported", versions={"jax": version("jax")})
    # The results' dtype that XLA multiplies bfloat16 fast with.
    product = jax.jit(functools.partial(jnp.einsum, preferred_element_type=jnp.float32), static_argnums=0)

    def make(spec: str, left: Any, right: Any) -> Callable[[], Any]:
        a, b = (jnp.full(shape, 0.5, WORK["dtype"]) for shape in (left, right))  # a CPU is as fast on any numbers
        return lambda: jax.block_until_ready(product(spec, a, b))

    return make


def in_torch() -> Callable[[str, Any, Any], Callable[[], Any]]:
    import torch

    TURNS.say("imported", versions={"torch": version("torch")})

    def make(spec: str, left: Any, right: Any) -> Callable[[], Any]:
        a, b = (torch.full(shape, 0.5, dtype=getattr(torch, WORK["dtype"])) for shape in (left, right))
        return lambda: torch.einsum(spec, a, b)

    return make


def main() -> None:
    make = in_jax() if WORK["backend"] == "jax" else in_torch()
    listed = products()
    TURNS.say("built", parameters=None)
    while True:
        least = []
        for _, spec, left, right, _ in listed:
            run = make(spec, left, right)  # one at a time, so that little memory is held
            times = []
            for _ in range(4):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            least.append(min(times[1:]))
        total = sum(seconds * product[-1] for seconds, product in zip(least, listed))
        detail = [
            {"name": p[0], "spec": p[1], "shapes": p[2:4], "count": p[4], "seconds": s, "flops": flops(p) / p[4]}
            for p, s in zip(listed, least)
        ]
        TURNS.done(None, seconds=total, more=detail)


main()
