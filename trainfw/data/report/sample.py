"""Samples of bounded size, in which copies are together or not at all, and near copies mostly so."""

from __future__ import annotations

import array
import hashlib
from dataclasses import dataclass, field

import numpy as np

from trainfw.data.report.ngrams import ngrams, words_of

SAMPLE_BYTES = 2**27
"""Most bytes of text in a sample."""
HASHES = 2**24
"""Most documents of which copies are counted exactly; their hashes take 12 bytes each."""
NEAR_WORDS = 5
"""Words in a row of which the sets are made that near duplicates are compared by."""
_SPACE = 2**64
_PART = slice(1000, 5000)
"""Characters of a long text that decide if it is in a sample."""


def hash_of(text: str) -> int:
    """Return 64 bits of a hash of a text: of 16 million, two that differ share one with a chance of one to 130,000."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


def near_key(text: str, number: int) -> int:
    """Return the number, uniform in 64 bits, that decides if a text is in a sample for near copies.

    `number` is its hash. The key is a hash of the least of the hashes of its n-grams, which texts of a Jaccard
    similarity J have in common with a chance of J (MinHash with one permutation): a text comes with about 80% of its
    near copies, or more, where a plain sample of 1% would hold 1% of them. Of a long text a part is read, past what
    many files begin with.
    """
    part = text[_PART] if len(text) > _PART.stop else text
    grams = ngrams(words_of(part), NEAR_WORDS)
    least = int(grams.min()).to_bytes(8) if len(grams) else number.to_bytes(8)
    return int.from_bytes(hashlib.blake2b(least, digest_size=8).digest())


@dataclass
class Sampled:
    """A text of the sample, once for all of its copies."""

    id: str
    key: int
    value: object
    """Text of a document, or the row of an example."""
    size: int
    counts: dict[int, int] = field(default_factory=dict)
    """Number of copies in each source that has some, by the source's number."""


class Sample:
    """Texts whose key is below a limit, which is halved whenever they become too many, or too large."""

    def __init__(self, documents: int, size: int = SAMPLE_BYTES) -> None:
        self._most, self._most_bytes = documents, size
        self._kept: dict[int, Sampled] = {}
        self._bytes = 0
        self.halvings = 0

    def add(self, key: int, number: int, source: int, id_: str, value: object, size: int) -> None:
        """Consider a text by its hash, `number`, and its key: that or, for a sample for near copies, its `near_key`."""
        if key >= _SPACE >> self.halvings:
            return
        if number not in self._kept:
            self._kept[number] = Sampled(id_, key, value, size)
            self._bytes += size
        counts = self._kept[number].counts
        counts[source] = counts.get(source, 0) + 1
        while len(self._kept) > self._most or (self._bytes > self._most_bytes and len(self._kept) > 1):
            self.halvings += 1
            self._kept = {one: kept for one, kept in self._kept.items() if kept.key < _SPACE >> self.halvings}
            self._bytes = sum(kept.size for kept in self._kept.values())

    def items(self) -> list[Sampled]:
        """Return what is in it, in the order of the sources."""
        return list(self._kept.values())

    def some(self, source: int, count: int) -> list[Sampled]:
        """Return a few texts of a source, drawn at random."""
        drawn = sorted(number for number, kept in self._kept.items() if source in kept.counts)[:count]
        return [self._kept[number] for number in drawn]


class Copies:
    """Counts of documents that equal an earlier one; estimated from a share of them where they are too many."""

    def __init__(self, most: int = HASHES) -> None:
        self._most, self.halvings = most, 0
        self._hashes, self._sources = array.array("Q"), array.array("i")

    def add(self, number: int, source: int) -> None:
        """Count a document by its hash."""
        if number < _SPACE >> self.halvings:
            self._hashes.append(number)
            self._sources.append(source)
            if len(self._hashes) > self._most:
                self.halvings += 1
                kept = np.array(self._hashes) < _SPACE >> self.halvings
                self._hashes = array.array("Q", np.array(self._hashes)[kept].tobytes())
                self._sources = array.array("i", np.array(self._sources)[kept].tobytes())

    def by_source(self, sources: int) -> np.ndarray:
        """Return how many documents of each source equal an earlier one, in it or in another: i64, (sources,)."""
        hashes, owners = np.array(self._hashes), np.array(self._sources, np.int64)
        later = np.ones(len(hashes), bool)
        later[np.unique(hashes, return_index=True)[1]] = False
        return np.bincount(owners[later], minlength=sources) << self.halvings
