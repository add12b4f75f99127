"""Frozen weights in 4 or 8 bits, and back.

NF4 is the code of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): blocks of weights share a scale, and the scales are
themselves kept in 8 bits (double quantisation). Codes, scales and what scales the scales are arrays of their own, with
the names of the weight's dims, so that they are sharded as the weight is.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from trainfw.errors import UserError

Precision: TypeAlias = Literal["int8", "nf4"]

# arXiv:2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(NF4))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight (..., m, n) as codes. Of a stack of matrices, each is quantised by itself."""

    codes: jax.Array
    """int8, of the weight's shape; or uint8 (NF4), two codes in a byte: dim `dim` is half as long."""
    scales: jax.Array
    """f32 (int8: one for each slice along `dim`); uint8 (NF4: dim `dim` is its blocks)."""
    low: jax.Array | None = None
    """NF4: what code 0 of a row of scales stands for, f32 (..., 1)."""
    step: jax.Array | None = None
    """NF4: what a row's scales differ by from one code to the next, f32 (..., 1)."""
    dim: int = field(default=-2, metadata={"static": True})
    """Dim along which blocks lie, -1 or -2: the one that a product sums over, or an embedding's row."""

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        shape = list(self.codes.shape)
        shape[self.dim] *= 1 if self.codes.dtype == jnp.int8 else 2
        return tuple(shape)

    def dims(self, names: Sequence[str | None], split: Collection[str]) -> Quantized:
        """Name the dims of each array, given those of the weight and the names that are always split."""
        names = tuple(names)
        across = tuple(None if i == len(names) + self.dim else name for i, name in enumerate(names))
        if self.low is None:
            return Quantized(names, across, dim=self.dim)  # type: ignore[arg-type]
        # Small: whole on every device but for what stays split, so that no collective waits for them.
        row = (*(name if name in split else None for name in names[:-1]), None)
        return Quantized(names, names, row, row, dim=self.dim)  # type: ignore[arg-type]


def quantize(weight: jax.Array, precision: Precision, *, block: int = 64, dim: int = -2) -> Quantized:
    """Store `weight` (..., m, n) in int8, with a scale for each slice along `dim`; or in NF4, one for each `block`.

    Raises UserError where NF4's block does not divide the dim.
    """
    weight = weight.astype(jnp.float32)
    if precision == "int8":
        scales = jnp.max(jnp.abs(weight), axis=dim, keepdims=True) / 127.0
        codes = jnp.round(weight / jnp.where(scales == 0.0, 1.0, scales)).astype(jnp.int8)
        return Quantized(codes, scales, dim=dim)
    size = weight.shape[dim]
    if problem := block_problem(size, block):
        raise UserError(problem)
    split = (*weight.shape[: weight.ndim + dim], size // block, block, *weight.shape[weight.ndim + dim + 1 :])
    blocks = weight.reshape(split)
    absmax = jnp.max(jnp.abs(blocks), axis=dim)
    # The scales of a row, in 8 bits between the least and the largest.
    low = jnp.min(absmax, axis=-1, keepdims=True)
    step = (jnp.max(absmax, axis=-1, keepdims=True) - low) / 255.0
    scales = jnp.round((absmax - low) / jnp.where(step == 0.0, 1.0, step)).astype(jnp.uint8)
    # Codes suit the scales as they are kept.
    kept = jnp.expand_dims(low + scales * step, dim)
    nibbles = jnp.searchsorted(jnp.array(_MIDDLES), blocks / jnp.where(kept == 0.0, 1.0, kept)).astype(jnp.uint8)
    nibbles = nibbles.reshape(weight.shape)
    pairs = nibbles.reshape((*split[: weight.ndim + dim], size // 2, 2, *split[weight.ndim + dim + 2 :]))
    first, second = (jnp.take(pairs, i, axis=dim) for i in (0, 1))
    return Quantized(first | (second << 4), scales, low, step, dim)


def block_problem(size: int, block: int) -> str | None:
    """Say why a dim of `size` cannot be cut into blocks of `block` weights, two in a byte, or None."""
    if block % 2 == 0 and size % block == 0:
        return None
    fitting = [n for n in range(2, min(size, 256) + 1, 2) if size % n == 0]
    nearest = min(fitting, key=lambda n: abs(n - block), default=None)
    return f"block = {block}: expected an even number that divides {size:,}" + (
        "" if nearest is None else f", such as {nearest}"
    )


def dequantize(weight: Quantized, dtype: jnp.dtype) -> jax.Array:
    """Decode the weight in `dtype`. Elementwise operations only: a table look-up is a slow gather
    on accelerators, so codes are told apart bit by bit.
    """
    if weight.low is None or weight.step is None:
        return (weight.codes.astype(jnp.float32) * weight.scales).astype(dtype)
    scales = weight.low + weight.scales.astype(jnp.float32) * weight.step
    dim = weight.dim
    at = weight.codes.ndim + dim
    halves = jnp.stack([weight.codes & 15, weight.codes >> 4], axis=at + 1)  # (..., m / 2, 2, n)
    blocks = weight.scales.shape[at]
    values = _value(halves.reshape(*weight.shape[:at], blocks, -1, *weight.shape[at + 1 :]))
    return (values * jnp.expand_dims(scales, at + 1)).astype(dtype).reshape(weight.shape)


def _value(codes: jax.Array) -> jax.Array:
    """Look up NF4's number for each code, f32."""
    values: list[jax.Array | float] = list(NF4)
    for bit in range(4):
        on = (codes >> bit) & 1 == 1
        values = [jnp.where(on, one, zero) for zero, one in zip(values[::2], values[1::2])]
    return values[0].astype(jnp.float32)  # type: ignore[union-attr]
