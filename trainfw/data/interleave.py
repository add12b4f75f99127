"""Order in which the rows of several sources follow one another, by shares that hold for every prefix.

R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), pages 323-330: of K sources, each with a
share of every place, places are dealt so that after n of them no source is more than 1 - 1/(2 K - 2) from the sum of
its shares, whatever n and the shares are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_CHUNK = 4096
"""Places dealt at once."""
_KEPT = 64
"""Chunks kept, at least."""
_NEVER = 2**62


@dataclass(frozen=True)
class Shares:
    """Shares of K sources, each summing to 1, which go linearly from `start` to `end` within `rows` places."""

    start: tuple[Fraction, ...]
    end: tuple[Fraction, ...]
    rows: int

    @classmethod
    def of(cls, start: Sequence[float], end: Sequence[float] | None = None, rows: int = 1) -> Shares:
        """Return the shares of these weights, which are taken for the decimal numbers that they are written as."""
        return cls(_normal(start), _normal(start if end is None else end), rows)

    def total(self, source: int, places: int) -> Fraction:
        """Return the sum of a source's shares over so many places; beyond `rows` the shares stay as they are."""
        start, end, within = self.start[source], self.end[source], min(places, self.rows)
        return start * within + (end - start) * Fraction(within * within, 2 * self.rows) + end * (places - within)


def _normal(weights: Sequence[float]) -> tuple[Fraction, ...]:
    exact = [Fraction(repr(weight)) for weight in weights]
    return tuple(one / sum(exact) for one in exact)


class Interleaving:
    """Places of an endless order, each a source and the number of the source's row that it holds.

    It begins at place `done`, before which the sources had `counts` rows. Any thread may ask for any place from there
    on, and near the last one that was asked for.
    """

    def __init__(self, shares: Shares, done: int = 0, counts: Sequence[int] | None = None, ahead: int = 0) -> None:
        """Begin at a place; `ahead` is how far others read ahead of the place that is counted."""
        self._kept = max(_KEPT, 2 * ahead // _CHUNK + 8)
        self._counts = [0] * len(shares.start) if counts is None else list(counts)
        self._first = self._next = done
        self._lock = threading.Lock()
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray, list[int]]] = {}
        # Integers over one denominator, since fractions are slow: twice the total after m places is m * (a + b * m).
        whole = math.lcm(*(share.denominator for share in (*shares.start, *shares.end))) * 2 * shares.rows
        self._whole, self._rows = whole, shares.rows
        self._linear = [int(share * whole) for share in shares.start]
        self._square = [int((end - start) * whole / (2 * shares.rows)) for start, end in zip(shares.start, shares.end)]
        self._after = [int(share * whole) for share in shares.end]
        self._due = [self._when(source) for source in range(len(self._counts))]

    def place(self, index: int) -> tuple[int, int]:
        """Return (source, its row) at a place."""
        source, row, _ = self._chunk(index)
        at = (index - self._first) % _CHUNK
        return int(source[at]), int(row[at])

    def counts(self, index: int) -> list[int]:
        """Return how many rows each source has before a place."""
        source, _, before = self._chunk(index)
        had = np.bincount(source[: (index - self._first) % _CHUNK], minlength=len(before))
        return [int(count) for count in before + had]

    def _chunk(self, index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        with self._lock:
            while index >= self._next:
                self._deal()
            number = (index - self._first) // _CHUNK
            if index < self._first or number not in self._chunks:
                raise IndexError(f"place {index} was left behind; the order is at {self._next}")
            return self._chunks[number]

    def _deal(self) -> None:
        before, dealt = list(self._counts), []
        for place in range(self._next + 1, self._next + _CHUNK + 1):
            # Of those that may come by now, the one that must come soonest.
            chosen = min((due, k) for k, (may, due) in enumerate(self._due) if may <= place)[1]
            dealt.append(chosen)
            self._counts[chosen] += 1
            self._due[chosen] = self._when(chosen)
        source, row = np.array(dealt, np.int32), np.empty(_CHUNK, np.int64)
        for k, count in enumerate(before):
            mine = source == k
            row[mine] = count + np.arange(np.count_nonzero(mine))
        number = (self._next - self._first) // _CHUNK
        self._chunks[number] = source, row, before
        self._chunks.pop(number - self._kept, None)
        self._next += _CHUNK

    def _when(self, source: int) -> tuple[int, int]:
        """Return the first place that a source's next row may take, and the last that it must."""
        if len(self._counts) == 1:
            return 0, 0
        parts, had = 2 * len(self._counts) - 2, self._counts[source]
        return self._reached(source, parts * had + 1, parts), self._reached(source, parts * had + parts - 1, parts)

    def _reached(self, source: int, number: int, parts: int) -> int:
        """Return the least count of places over which a source's shares sum to number / parts."""
        wanted = -(-number * self._whole // parts)
        if (each := self._after[source]) == self._linear[source]:  # a constant share, as most are
            return -(-wanted // each) if each else _NEVER
        high = 1
        while self._total(source, high) < wanted:
            high *= 2
            if high > _NEVER:
                return _NEVER
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._total(source, middle) >= wanted else (middle, high)
        return high

    def _total(self, source: int, places: int) -> int:
        within = min(places, self._rows)
        total = within * (self._linear[source] + self._square[source] * within)
        return total + (places - within) * self._after[source]
