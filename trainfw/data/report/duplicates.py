"""Near duplicates: MinHash signatures (datasketch's) proposes pairs of documents, exact Jaccard similarity decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainfw.data.progress import Progress, reported
from trainfw.errors import UserError, pip_install

PERMUTATIONS = 128
"""Numbers in a signature: the similarity that it estimates is off by 0.035 (one standard deviation) at 0.8."""
_SLACK = 0.12
"""Shortfall of an estimate below the threshold up to which the true similarity is computed."""
_FOUND = 0.995
"""Least chance that two documents at the threshold are compared."""
_ALIKE = 32
"""Documents of one bucket that are compared, each with each; of a fuller bucket, each with so many others."""
_PIECE = 2**14
"""N-grams hashed at once: a product with every permutation takes 8 MB."""


class Link(NamedTuple):
    """Two near duplicates, by their numbers, and their true similarity."""

    first: int
    second: int
    jaccard: float


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of what is in both of all that is in either, of sorted sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def bands_for(threshold: float) -> tuple[int, int]:
    """Return how many bands a signature is cut into, of how many numbers each.

    Documents are compared where they agree in a whole band, so wide bands propose few pairs; these are the widest that
    miss at most `1 - _FOUND` of the pairs at the threshold.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _FOUND:
            return bands, rows
    return PERMUTATIONS, 1


def near_duplicates(sets: Sequence[np.ndarray], threshold: float, progress: Progress | None = None) -> list[Link]:
    """Find documents whose sets of n-grams (`ngram_set`) have a Jaccard similarity of `threshold` or more.

    Of pairs at the threshold 99.5% are proposed, of more similar ones more; each is verified, so none is false. Pairs
    that others have joined into one group already are left out, so there are fewer links than documents. Empty sets are
    near nothing. Takes 512 bytes a document, and sorting.
    """
    numbers = [number for number, one in enumerate(sets) if len(one)]
    if len(numbers) < 2:
        return []
    chosen = reported((sets[number] for number in numbers), "Hashing documents", len(numbers), progress)
    signatures = _signatures(chosen, len(numbers))
    groups, refused, links = Groups(len(numbers)), set[tuple[int, int]](), list[Link]()
    bands = bands_for(threshold)[0]
    for pairs in reported(_proposed(signatures, threshold), "Comparing documents, pass", bands, progress):
        roots = groups.roots()
        for i, j in pairs[roots[pairs[:, 0]] != roots[pairs[:, 1]]].tolist():
            if (i, j) in refused or groups.root(i) == groups.root(j):
                continue
            first, second = sets[numbers[i]], sets[numbers[j]]
            shorter, longer = sorted((len(first), len(second)))
            found = jaccard(first, second) if shorter >= threshold * longer else 0.0
            if found >= threshold:
                groups.join(i, j)
                links.append(Link(numbers[i], numbers[j], found))
            else:
                refused.add((i, j))
    return links


class Groups:
    """Numbers joined into groups (a union-find)."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def root(self, number: int) -> int:
        """Return the smallest number of a group."""
        while (above := self._above[number]) != number:
            self._above[number] = number = self._above[above]
        return number

    def roots(self) -> np.ndarray:
        """Return the root of each number, i64 (count,)."""
        return np.array([self.root(number) for number in range(len(self._above))])

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._above[high] = low


def _signatures(sets: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Return the MinHash signatures of sets that are not empty: u32, (count, PERMUTATIONS)."""
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise UserError(f"near duplicates need {error.name}: {pip_install('report')}") from error
    empty = MinHash(PERMUTATIONS, scheme="affine32", hashfunc=lambda number: number)
    signatures = np.empty((count, PERMUTATIONS), np.uint32)
    for row, one in zip(signatures, sets, strict=True):
        sketch = empty.copy()
        for start in range(0, len(one), _PIECE):
            sketch.update_batch(one[start : start + _PIECE] >> np.uint64(32))
        row[:] = sketch.hashvalues
    return signatures


def _proposed(signatures: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """Yield pairs of rows, i64 (n, 2), that agree in a band and seem similar enough on the whole.

    Those of one band come at once. Rows are sorted by a band, rather than kept in an index, which would take 8 KB a
    document.
    """
    bands, width = bands_for(threshold)
    random = np.random.default_rng(0)
    for band in range(bands):
        # In a bucket too full for comparing all, others are neighbours in each band.
        shuffled = random.permutation(len(signatures))
        keys = np.ascontiguousarray(signatures[shuffled, band * width : (band + 1) * width])
        order = np.argsort(keys.view([("", keys.dtype)] * width).reshape(-1), kind="stable")
        ordered, rows = keys[order], shuffled[order]
        similar = [np.zeros((0, 2), np.int64)]
        for distance in range(1, min(_ALIKE, len(rows))):
            alike = np.flatnonzero((ordered[distance:] == ordered[:-distance]).all(axis=1))
            if not len(alike):
                break
            pairs = np.sort(np.stack([rows[alike], rows[alike + distance]], axis=1), axis=1)
            for start in range(0, len(pairs), _PIECE):
                similar.append(_similar(signatures, pairs[start : start + _PIECE], threshold - _SLACK))
        yield np.concatenate(similar)


def _similar(signatures: np.ndarray, pairs: np.ndarray, least: float) -> np.ndarray:
    """Return those of the pairs whose signatures estimate a similarity of `least` or more."""
    agreeing = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
    return pairs[agreeing >= least]
