"""Overlap with an evaluation set: documents that hold some words in a row of one of its examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from trainfw.data.report.ngrams import ngrams, words_of
from trainfw.errors import UserError

WORDS = 13
"""Words in a row that make an overlap, as for GPT-3 (Brown et al., arXiv:2005.14165, appendix C)."""
_MOST = 2**25
"""Most n-grams of an evaluation set: they take 24 bytes each."""


class Overlap(NamedTuple):
    """Words in a row that a document shares with an example, and the number of that example."""

    words: str
    example: int


class EvaluationSet:
    """The n-grams of a set of examples, in which those of documents are looked for."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        """Read the examples; those of fewer than `size` words are counted, and never found."""
        self.size, self.examples, self.too_short = size, 0, 0
        hashes, owners, total = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
        for number, text in enumerate(texts):
            found = np.unique(ngrams(words_of(text), size))
            hashes.append(found)
            owners.append(np.full(len(found), number))
            self.examples += 1
            self.too_short += not len(found)
            if (total := total + len(found)) > _MOST:
                raise UserError(f"has more than {_MOST:,} words; expected an evaluation set, or part of one")
        owner = np.concatenate(owners)
        self._grams, places = np.unique(np.concatenate(hashes), return_inverse=True)
        order = np.argsort(places, kind="stable")
        self._owners, self._ends = owner[order], np.searchsorted(places[order], np.arange(len(self._grams) + 1))
        self._seen = np.zeros(len(self._grams), bool)

    def find(self, text: str) -> Overlap | None:
        """Return the first overlap of a document, if there is one, and note all of them for `examples_seen`."""
        words = words_of(text)
        grams = ngrams(words, self.size)
        if not len(grams) or not len(self._grams):
            return None
        places = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        hits = np.flatnonzero(self._grams[places] == grams)
        if not len(hits):
            return None
        self._seen[places[hits]] = True
        return Overlap(" ".join(words[hits[0] : hits[0] + self.size]), int(self._owners[self._ends[places[hits[0]]]]))

    def examples_seen(self) -> int:
        """Count the examples of which a document held some words in a row."""
        return len(np.unique(self._owners[np.repeat(self._seen, np.diff(self._ends))]))
