"""Random numbers of rows: each row's depend on a seed and on its number alone, not on the batch that it is in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

NOISE, TIME, KEEP, FIRST = range(4)
"""Purposes of draws, each of which has a stream of its own: noise in training, its time, a condition that is kept or
left out; and the noise that drawing begins with."""
_WORD = 2**64 - 1


def normal_rows(seed: int, row_B: np.ndarray, shape: tuple[int, ...], purpose: int = NOISE) -> np.ndarray:
    """Draw standard normal numbers, f32 of `shape` for each row."""
    noise = np.empty((len(row_B), *shape), np.float32)
    for out, generator in zip(noise, _generators(seed, row_B, purpose), strict=True):
        generator.standard_normal(out=out, dtype=np.float32)
    return noise


def uniform_rows(seed: int, row_B: np.ndarray, purpose: int) -> np.ndarray:
    """Draw a number from [0, 1) for each row, f64."""
    return np.array([generator.random() for generator in _generators(seed, row_B, purpose)], np.float64)


def _generators(seed: int, row_B: np.ndarray, purpose: int) -> Iterator[np.random.Generator]:
    """Give each row's generator: one that is set anew, since making one takes longer than a small row's draws.

    Philox (Salmon et al., SC 2011) is keyed by seed and row; purposes begin at counters that none of them reaches.
    """
    bits = np.random.Philox(key=0)
    generator, start = np.random.Generator(bits), bits.state
    counter = np.array([0, 0, 0, purpose], np.uint64)
    for row in row_B.tolist():
        key = np.array([seed & _WORD, row & _WORD], np.uint64)
        bits.state = start | {"state": {"counter": counter, "key": key}}
        yield generator
