from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import DataConfig, ExampleRows, PairRows, Rows, TokenStore, open_rows
from trainfw.data.rows import pack
from trainfw.errors import UserError

from .conftest import make_store

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)
S = st.integers(1, 50)


@given(lengths, S)
@settings(deadline=None)
def test_each_token_is_predicted_once_from_its_own_document(lengths: list[int], S: int) -> None:
    store = make_store(lengths)
    predicted = []
    for row in map(Rows(store, S).__getitem__, range(len(Rows(store, S)))):
        assert {name: (values.shape, values.dtype.name) for name, values in row.items()} == {
            **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ((S,), "int32")),
            "loss_mask": ((S,), "float32"),
        }
        counted = row["loss_mask"] == 1
        assert (row["targets"][counted] == row["tokens"][counted] + 1).all()
        predicted += row["targets"][counted].tolist()
    firsts = set(store.tokens[store.offsets[:-1]].tolist())
    assert predicted == [token for token in store.tokens.tolist() if token not in firsts]


@given(lengths, S)
@settings(deadline=None)
def test_every_input_knows_its_document(lengths: list[int], S: int) -> None:
    store = make_store(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)  # of each token of the stream
    inputs = []
    for row in map(Rows(store, S).__getitem__, range(len(Rows(store, S)))):
        real = row["segment_ids"] > 0
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
        assert all((values[~real] == 0).all() for values in row.values())
        of = document[row["tokens"][real] - 1]
        segments = row["segment_ids"][real]
        assert (segments == of - of[0] + 1).all()
        for segment in np.unique(segments):
            assert row["positions"][real][segments == segment].tolist() == list(range((segments == segment).sum()))
        inputs += row["tokens"][real].tolist()
    assert inputs == store.tokens[:-1].tolist(), "every token but the last is an input once"


def test_outside() -> None:
    rows = Rows(make_store([3, 4]), 4)
    assert len(rows) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            rows[index]


def example_store(examples: list[list[bool]]) -> TokenStore:
    """Examples of which these tokens are learnt; every token differs from the others, and none is 0."""
    store = make_store([len(learnt) for learnt in examples])
    mask = np.array([learnt for example in examples for learnt in example], bool)
    return TokenStore(store.tokens, store.offsets, store.num_bytes, store.digest, mask)


examples = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=19).map(lambda rest: [False, *rest]), min_size=1, max_size=40
)


@given(examples, st.integers(19, 50))
@settings(deadline=None)
def test_examples_are_packed_whole_and_once(examples: list[list[bool]], S: int) -> None:
    store = example_store(examples)
    rows = ExampleRows(store, S)
    seen, filled = [], 0
    for row in map(rows.__getitem__, range(len(rows))):
        assert {name: (values.shape, values.dtype.name) for name, values in row.items()} == {
            **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ((S,), "int32")),
            "loss_mask": ((S,), "float32"),
        }
        real = row["segment_ids"] > 0
        filled += real.sum()
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
        assert all((values[~real] == 0).all() for values in row.values())
        assert np.unique(row["segment_ids"][real]).tolist() == list(range(1, row["segment_ids"].max() + 1))
        for segment in range(1, row["segment_ids"].max() + 1):
            own = row["segment_ids"] == segment
            tokens = [*row["tokens"][own].tolist(), int(row["targets"][own][-1])]
            assert row["targets"][own].tolist() == tokens[1:], "no target of another example"
            assert row["positions"][own].tolist() == list(range(len(tokens) - 1))
            example = int(np.searchsorted(store.offsets, tokens[0] - 1, side="right")) - 1
            assert tokens == store.tokens[slice(*store.offsets[example : example + 2])].tolist()
            assert row["loss_mask"][own].tolist() == examples[example][1:]
            seen.append(example)
    assert sorted(seen) == list(range(len(examples)))
    assert rows.filled == filled / (S * len(rows))
    assert sum(int(rows[i]["loss_mask"].sum()) for i in range(len(rows))) == store.num_targets


def test_packing_is_tight_quick_and_always_the_same() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 300, 200_000).clip(1, 2048)
    bins = pack(lengths, 2048)
    filled = np.bincount(bins, lengths)
    assert filled.max() <= 2048
    assert len(filled) <= 1.001 * lengths.sum() / 2048 + 1
    first = np.unique(bins, return_index=True)[1]
    assert (np.diff(first) > 0).all(), "in the order of their first example"
    assert (pack(lengths, 2048) == bins).all()


def test_examples_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="an example of 6 tokens does not fit into rows of 4"):
        ExampleRows(example_store([[False] * 6]), 4)
    with pytest.raises(UserError, match="2 training examples make 1 rows of 8, fewer than the 2 of one batch"):
        ExampleRows(example_store([[False] * 3] * 2), 8).require(2)


learnt = st.lists(st.booleans(), min_size=1, max_size=19).map(lambda rest: [False, *rest])


@given(st.lists(st.tuples(learnt, learnt), min_size=1, max_size=30), st.integers(19, 60), st.integers(1, 9))
@settings(deadline=None)
def test_pairs_are_packed_whole_and_once(pairs: list[tuple[list[bool], list[bool]]], S: int, most: int) -> None:
    examples = [side for pair in pairs for side in pair]
    store = replace(example_store(examples), group=2)
    rows = open_rows(store, DataConfig(sequence_length=S, format="preferences", pairs_per_row=most))
    assert isinstance(rows, PairRows)
    seen, firsts, filled = [], [], 0
    for index, row in enumerate(map(rows.__getitem__, range(len(rows)))):
        assert {name: (values.shape, values.dtype.name) for name, values in row.items()} == {
            **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ((2, S), "int32")),
            "loss_mask": ((2, S), "float32"),
        }
        count = int(row["segment_ids"].max())
        assert 1 <= count <= most
        assert len(rows.groups(index)) == count
        for side in (0, 1):
            own_side = {name: values[side] for name, values in row.items()}
            real = own_side["segment_ids"] > 0
            filled += real.sum()
            assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
            assert all((values[~real] == 0).all() for values in own_side.values())
            for segment, pair in zip(range(1, count + 1), rows.groups(index), strict=True):
                own = own_side["segment_ids"] == segment
                tokens = [*own_side["tokens"][own].tolist(), int(own_side["targets"][own][-1])]
                assert own_side["targets"][own].tolist() == tokens[1:]
                example = 2 * int(pair) + side
                assert tokens == store.tokens[slice(*store.offsets[example : example + 2])].tolist()
                assert own_side["positions"][own].tolist() == list(range(len(tokens) - 1))
                assert own_side["loss_mask"][own].tolist() == examples[example][1:]
        seen += rows.groups(index).tolist()
        firsts.append(int(rows.groups(index)[0]))
    assert sorted(seen) == list(range(len(pairs)))
    assert firsts == sorted(firsts), "in the order of their first pair"
    assert rows.filled == filled / (2 * S * len(rows))


def test_pairs_that_do_not_make_a_batch() -> None:
    rows = PairRows(replace(example_store([[False] * 3] * 4), group=2), 8, 8)
    with pytest.raises(UserError, match="2 training pairs make 1 rows of 8, fewer than the 2 of one batch"):
        rows.require(2)
    with pytest.raises(IndexError):
        rows[1]
    with pytest.raises(UserError, match="an example of 6 tokens does not fit into rows of 4"):
        PairRows(replace(example_store([[False] * 3, [False] * 6]), group=2), 4, 8)
