"""Lowering of a primitive of jax on a CPU, where jax's own rule costs time for nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax._src.lax.lax import _reduce_precision_lower  # what holds for all else has no public name
from jax.interpreters import mlir


@functools.cache  # once in a process
def leave_saved(here: Callable[[], bool]) -> None:
    """Have float32 and bfloat16 arrays that `jax.checkpoint` saves left as they are, wherever `here` holds.

    It rounds what it saves to the bits of its dtype, lest XLA hold more of them in one place than in another
    (github.com/jax-ml/jax/pull/22244). XLA never does with float32 on a CPU; of bfloat16 the forward pass may then read
    what was not yet rounded, as it does where nothing is checkpointed. And XLA copies the array for it: of
    benchmarks/peers.py's step 2% (jaxlib 0.10.2).
    """

    def lower(ctx: mlir.LoweringRuleContext, x: Any, *, exponent_bits: int, mantissa_bits: int) -> Any:
        dtype = cast(jax.core.ShapedArray, ctx.avals_in[0]).dtype
        info = jnp.finfo(dtype)
        exact = dtype in (jnp.float32, jnp.bfloat16) and (exponent_bits, mantissa_bits) == (info.nexp, info.nmant)
        if exact and here():
            return [x]
        return _reduce_precision_lower(ctx, x, exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)

    mlir.register_lowering(jax.lax.reduce_precision_p, lower, platform="cpu")
