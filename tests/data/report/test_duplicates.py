from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import DataConfig, jaccard, near_duplicates, ngram_set, open_source
from trainfw.data.report import duplicates
from trainfw.data.report.duplicates import Groups, bands_for
from trainfw.data.report.ngrams import ngrams, words_of

words = st.lists(st.sampled_from(["a", "bb", "ccc", "1", "é", "木", "人", "don't", "x_y"]), max_size=30)


@given(words, st.integers(1, 6))
@settings(deadline=None)
def test_ngrams_are_those_of_the_words(given: list[str], size: int) -> None:
    split = words_of(" ".join(given))
    hashes = ngrams(split, size)
    truth = [tuple(split[i : i + size]) for i in range(len(split) - size + 1)]
    assert len(hashes) == len(truth)
    assert len(dict(zip(truth, hashes.tolist()))) == len(set(hashes.tolist())) == len(set(truth))


def test_words() -> None:
    assert words_of("Hello, World_2 -- it's!") == ["hello", "world_2", "it", "s"]
    assert words_of("東京タワー is 高い") == [*"東京タワー", "is", *"高い"], "scripts without spaces: by the sign"
    assert len(ngram_set("one two", 5)) == 1, "a short text is one n-gram"
    assert ngram_set("one two", 5) != ngram_set("one three", 5)
    assert not len(ngram_set("... --", 5))


@given(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)))
def test_jaccard(a: set[int], b: set[int]) -> None:
    arrays = [np.array(sorted(one), np.uint64) for one in (a, b)]
    assert jaccard(*arrays) == len(a & b) / max(len(a | b), 1)


@given(st.floats(0.5, 1))
def test_bands_propose_nearly_all_at_the_threshold(threshold: float) -> None:
    bands, width = bands_for(threshold)
    assert bands * width <= duplicates.PERMUTATIONS
    assert 1 - (1 - threshold**width) ** bands >= 0.995


def _edited(text: str, least: float, dice: random.Random) -> str:
    """A copy in which random words are replaced, about as similar as can be asked for without going below."""
    own, split, best = ngram_set(text, 5), text.split(), text
    while True:
        split[dice.randrange(len(split))] = f"edit{dice.randrange(10**6)}"
        if jaccard(own, ngram_set(" ".join(split), 5)) < least:
            return best
        best = " ".join(split)


def test_planted_copies_are_found_and_no_others() -> None:
    """On Python's library, as benchmarks/duplicates.py does on more."""
    dice = random.Random(0)
    texts = [one.text[:4000] for one in open_source(DataConfig(sequence_length=1)).documents()]
    texts = [text for text in texts if len(text.split()) > 100][:300]
    sets = [ngram_set(text, 5) for text in texts]
    own = {(a, b) for a in range(len(sets)) for b in range(a) if jaccard(sets[a], sets[b]) >= 0.8}
    planted = [ngram_set(_edited(text, dice.uniform(0.8, 0.95), dice), 5) for text in texts[::3]]
    links = near_duplicates([*sets, *planted], 0.8)
    assert all(link.jaccard == jaccard(*([*sets, *planted][i] for i in link[:2])) >= 0.8 for link in links)
    assert {link[:2][::-1] for link in links if link.second < len(sets)} <= own
    groups = Groups(len(sets) + len(planted))
    for link in links:
        groups.join(link.first, link.second)
    found = [groups.root(3 * n) == groups.root(len(sets) + n) for n in range(len(planted))]
    assert sum(found) >= 0.95 * len(planted)


def test_a_great_many_alike_are_one_group_without_comparing_all() -> None:
    base = np.sort(np.random.default_rng(0).integers(0, 2**63, 100, np.uint64))
    sets = [np.unique(np.append(base, np.uint64(n))) for n in range(500)]
    links = near_duplicates([*sets, np.zeros(0, np.uint64), base[:50]], 0.8)
    assert len(links) == len(sets) - 1
    assert max(link.second for link in links) < len(sets)
    assert near_duplicates(sets[:1], 0.8) == near_duplicates([], 0.8) == []


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(Exception, match="near duplicates need datasketch: pip install"):
        near_duplicates([np.arange(3, dtype=np.uint64)] * 2, 0.8)
