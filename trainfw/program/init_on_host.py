from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trainfw.program.state import TrainState

_AT_ONCE = 8 * 2**30
"""Bytes of state that the host computes before it hands them on."""


def init_on_host(
    init: Callable[[], TrainState], shardings: TrainState, compiler_options: dict[str, str]
) -> Callable[[], TrainState]:
    """`init` computed on the host's CPU and placed by `shardings`, for devices that cannot draw random numbers well.

    Every process computes the whole, about 8 GiB (or one array, if that is larger) at a time, and keeps its part.
    """
    abstract, tree = jax.tree.flatten(jax.eval_shape(init))
    parts: list[list[int]] = [[]]
    size = 0
    for i, leaf in enumerate(abstract):
        size += leaf.size * leaf.dtype.itemsize
        if size > _AT_ONCE and parts[-1]:
            parts.append([])
            size = leaf.size * leaf.dtype.itemsize
        parts[-1].append(i)

    def run() -> TrainState:
        leaves: list[Any] = list(jax.tree.leaves(shardings))
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for part in parts:
                # What a part does not return is not computed for it.
                compute = jax.jit(
                    lambda part=part: [jax.tree.leaves(init())[i] for i in part], compiler_options=compiler_options
                )
                for i, value in zip(part, map(np.asarray, compute()), strict=True):
                    leaves[i] = jax.make_array_from_callback(value.shape, leaves[i], value.__getitem__)
        return jax.tree.unflatten(tree, leaves)

    return run
