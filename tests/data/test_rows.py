from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import (
    DataConfig,
    DocumentRows,
    ExampleRows,
    PairRows,
    Rows,
    TokenStore,
    open_rows,
    open_validation_rows,
    torn_share,
)
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


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), S, st.booleans())
@settings(deadline=None)
def test_documents_that_fit_are_never_torn(lengths: list[int], S: int, never: bool) -> None:
    store = make_store(lengths)
    split = "never" if never else "long"
    rows = open_rows(store, DataConfig(sequence_length=S, packing="best_fit", split=split))
    assert isinstance(rows, DocumentRows)
    predicted: list[int] = []
    pieces: dict[int, list[int]] = {}  # of each document, the places that its parts take
    filled = 0
    for row in map(rows.__getitem__, range(len(rows))):
        real = row["segment_ids"] > 0
        filled += real.sum()
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
        assert all((values[~real] == 0).all() for values in row.values())
        assert (row["loss_mask"][real] == 1).all()
        for segment in range(1, row["segment_ids"].max() + 1):
            own = row["segment_ids"] == segment
            assert row["positions"][own].tolist() == list(range(own.sum()))
            assert (row["targets"][own] == row["tokens"][own] + 1).all()
            document = int(np.searchsorted(store.offsets, row["tokens"][own][0] - 1, side="right")) - 1
            assert row["targets"][own][-1] <= store.offsets[document + 1], "no target of another document"
            predicted += row["targets"][own].tolist()
            pieces.setdefault(document, []).append(int(own.sum()))
    kept = [n for n, length in enumerate(lengths) if length > 1 and not (never and length - 1 > S)]
    expected = [token for n in kept for token in range(store.offsets[n] + 2, store.offsets[n + 1] + 1)]
    assert sorted(predicted) == expected, "every token but a document's first once"
    for n, parts in pieces.items():
        whole, rest = divmod(lengths[n] - 1, S)
        assert sorted(parts) == sorted([S] * whole + [rest] * bool(rest)), "cut as seldom as can be"
    assert rows.left_out == sum(length - 1 > S for length in lengths) * never
    assert rows.filled == (filled / (S * len(rows)) if len(rows) else 0)
    everything = open_validation_rows(store, DataConfig(sequence_length=S, packing="best_fit", split=split))
    held_out = sum(int(everything[i]["loss_mask"].sum()) for i in range(len(everything)))
    assert held_out == sum(max(length - 1, 0) for length in lengths), "nothing is left out of validation"


@given(lengths, S)
@settings(deadline=None)
def test_torn_documents_are_those_in_two_rows(lengths: list[int], S: int) -> None:
    store = make_store(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = Rows(store, S)
    seen: list[set[int]] = []  # the documents of which a row predicts something
    for row in map(rows.__getitem__, range(len(rows))):
        seen.append(set(document[row["tokens"][row["loss_mask"] == 1] - 1].tolist()))
    torn = {n for n in range(len(lengths)) if sum(n in one for one in seen) > 1}
    assert torn_share(store, S) == len(torn) / len(lengths)


def test_packing_is_part_of_the_order() -> None:
    store = make_store([3, 4])
    options = [{}, {"packing": "best_fit"}, {"packing": "best_fit", "split": "never"}, {"sequence_length": 5}]
    configs = [DataConfig(**{"sequence_length": 4} | one) for one in options]
    assert len({open_rows(store, config).order("shuffled") for config in configs}) == len(options)
    assert open_rows(store, configs[0]).order("shuffled") == f"{store.digest} 4 shuffled", "as runs have saved it"


def test_all_documents_left_out() -> None:
    rows = open_rows(make_store([9, 8]), DataConfig(sequence_length=4, packing="best_fit", split="never"))
    with pytest.raises(UserError, match=r"17 training tokens \(2 documents .* left out\) make 0 rows of 4, fewer than"):
        rows.require(1)


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
