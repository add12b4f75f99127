"""Copies that `benchmarks/duplicates.py` plants, and its judgement of what is found. The report is not run here."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import duplicates
    finally:
        sys.path.remove(str(BENCHMARKS))
    return duplicates


def test_planted_copies_are_as_similar_as_asked(bench):
    text = " ".join(f"w{n % 300}x{n % 7}" for n in range(600))
    for seed in range(20):
        copy, similarity = bench.plant(text, bench.shingles(text), ["a", "b"], random.Random(seed))
        assert 0.8 <= similarity <= 0.95
        assert similarity == bench.jaccard(bench.shingles(text), bench.shingles(copy))


def test_distinct_documents_are_no_near_copies(bench):
    texts = [" ".join(f"{n}w{k}" for k in range(200)) for n in range(5)]
    near = texts[2] + " more"
    chosen = bench.distinct([(str(n), text) for n, text in enumerate([*texts, near, "short"])], 10)
    assert [name for name, _, _ in chosen] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("found", "false", "ok"), [(100, 0, True), (95, 0, True), (94, 0, False), (100, 1, False)])
def test_judgement(bench, found, false, ok):
    planted = [(n, bench.DISTINCT + n, 0.82) for n in range(100)]
    similar = [(200 + n, bench.DISTINCT + 200 + n, similarity) for n, similarity in enumerate((0.87, 0.95))]
    pairs = {one[:2] for one in [*planted[:found], *similar]} | {(n, n + 1) for n in range(false)}
    _, checks = bench.judge([*planted, *similar], pairs, [])
    assert all(check["ok"] for check in checks) == ok
