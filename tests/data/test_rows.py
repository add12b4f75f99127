import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import Rows

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
