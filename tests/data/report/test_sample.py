from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data.report.sample import Copies, Sample, hash_of, near_key

texts = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=120)


@given(texts, st.integers(1, 30), st.integers(50, 400))
@settings(deadline=None)
def test_a_sample_holds_all_copies_or_none(given: list[tuple[int, int]], most: int, size: int) -> None:
    sample = Sample(most, size)
    for source, number in given:
        text = f"text {number}"
        key = near_key(text, hash_of(text))
        sample.add(key, hash_of(text), source, f"{source}:{number}", text, len(text))
    kept = {str(one.value): one for one in sample.items()}
    assert len(kept) <= most
    assert sum(one.size for one in kept.values()) <= size or len(kept) == 1
    counts = Counter((f"text {number}", source) for source, number in given)
    for text, one in kept.items():
        assert one.counts == {source: counts[text, source] for source in range(3) if counts[text, source]}
    limit = 2**64 >> sample.halvings
    assert set(kept) == {text for text, _ in counts if near_key(text, hash_of(text)) < limit}


@given(texts)
@settings(deadline=None)
def test_copies_are_of_an_earlier_document(given: list[tuple[int, int]]) -> None:
    copies, seen, expected = Copies(), set(), [0, 0, 0]
    for source, number in given:
        copies.add(hash_of(str(number)), source)
        expected[source] += number in seen
        seen.add(number)
    assert copies.by_source(3).tolist() == expected


def test_copies_are_estimated_where_they_are_too_many() -> None:
    copies = Copies(most=1000)
    for n in range(20_000):
        copies.add(hash_of(str(n % 15_000)), 0)
    assert copies.halvings >= 4
    assert 3000 < copies.by_source(1)[0] < 7000  # 5,000 of them; about 900 hashes are kept


def test_near_copies_come_into_a_sample_together() -> None:
    dice, sample = random.Random(0), Sample(300)
    for n in range(2000):
        words = [f"w{dice.randrange(10**6)}" for _ in range(200)]
        for copy in range(2):
            text = " ".join(words)
            sample.add(near_key(text, hash_of(text)), hash_of(text), 0, f"{n}:{copy}", text, len(text))
            words[dice.randrange(200)] = "other"  # a Jaccard similarity of 0.95
    drawn = [one.id.partition(":")[0] for one in sample.items()]
    assert 150 < len(drawn) <= 300
    assert sum(count == 2 for count in Counter(drawn).values()) > 0.85 * len(set(drawn))
