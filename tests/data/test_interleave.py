import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data.interleave import Interleaving, Shares

WEIGHTS = st.lists(st.floats(0, 50, allow_nan=False), min_size=1, max_size=7)


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    count = draw(st.integers(1, 7))
    one = st.lists(st.floats(0, 50).map(lambda x: round(x, 4)), min_size=count, max_size=count).filter(any)
    start = draw(one)
    return Shares.of(start, draw(st.one_of(st.just(start), one)), draw(st.integers(1, 900)))


@settings(max_examples=60, deadline=None)
@given(shares())
def test_every_prefix_holds_the_shares_within_one_row(shares):
    order, sources = Interleaving(shares), len(shares.start)
    bound = 1 - Fraction(1, 2 * sources - 2) if sources > 1 else Fraction(0)
    had: Counter[int] = Counter()
    for place in range(1000):
        source, row = order.place(place)
        assert row == had[source]
        had[source] += 1
        assert all(abs(had[k] - shares.total(k, place + 1)) <= bound for k in range(sources))


@settings(max_examples=20, deadline=None)
@given(shares(), st.integers(0, 6000))
def test_it_goes_on_from_any_place(shares, done):
    order = Interleaving(shares)
    later = Interleaving(shares, done, order.counts(done))
    for place in range(done, done + 300):
        assert later.place(place) == order.place(place)
    assert later.counts(done + 300) == order.counts(done + 300)


def test_weights_are_the_numbers_that_they_are_written_as():
    assert Shares.of([0.3, 0.1]).start == (Fraction(3, 4), Fraction(1, 4))
    order = Interleaving(Shares.of([3.0, 1.0]))
    assert [order.place(i)[0] for i in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_a_source_without_a_share_gives_nothing_and_annealing_moves_shares():
    order = Interleaving(Shares.of([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], 1000))
    found = Counter(order.place(i)[0] for i in range(1000))
    assert found == {0: 500, 2: 500}
    assert [order.place(i)[0] for i in itertools.chain(range(5), range(1995, 2000))] == [0] * 5 + [2] * 5


def test_every_prefix_of_200_blocks_of_five_random_mixtures():
    rng = np.random.default_rng(0)
    for sources in (2, 3, 4, 6, 8):
        shares = Shares.of(rng.uniform(0.01, 5, sources).round(3).tolist())
        order, rows = Interleaving(shares), 200 * 64
        dealt = np.array([order.place(place)[0] for place in range(rows)])
        places = np.arange(1, rows + 1)
        for source in range(sources):
            had, share = np.cumsum(dealt == source), shares.start[source]
            assert np.abs(had * share.denominator - places * share.numerator).max() < share.denominator
