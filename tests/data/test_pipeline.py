import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import (
    Batch,
    DataConfig,
    ExampleRows,
    Rows,
    TokenStore,
    TrainIterator,
    train_iterator,
    validation_batches,
)
from trainfw.errors import UserError

from .conftest import make_store

STORE = make_store([7, 20, 3, 41, 16, 9, 30, 2, 55])  # 183 tokens: 23 rows of 8
CONFIG = DataConfig(sequence_length=8, seed=3)
ROWS = len(Rows(STORE, 8))


def _iterator(config: DataConfig = CONFIG, **options: int) -> TrainIterator:
    return train_iterator(STORE, config, **{"global_batch_size": 4} | options)


def _ids(batch: Batch) -> list[int]:
    """Which rows a batch holds: the tokens of the store count upwards from 1."""
    return [int(first - 1) // 8 for first in batch["tokens"][:, 0]]


def _take(iterator: TrainIterator, steps: int) -> list[list[int]]:
    return [_ids(batch) for batch in itertools.islice(iterator, steps)]


def _joined(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def test_batches_hold_the_rows() -> None:
    batch = next(_iterator())
    rows = [Rows(STORE, 8)[id_] for id_ in _ids(batch)]
    for name, values in batch.items():
        assert values.dtype == rows[0][name].dtype
        np.testing.assert_array_equal(values, np.stack([row[name] for row in rows]))


def test_epochs_are_complete_and_differ() -> None:
    order = _joined(_take(_iterator(), ROWS))  # 4 epochs
    epochs = [tuple(order[i : i + ROWS]) for i in range(0, len(order), ROWS)]
    assert all(Counter(epoch) == Counter(range(ROWS)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_seed_and_shuffle() -> None:
    first = _take(_iterator(), 12)
    assert _take(_iterator(), 12) == first
    others = [_take(_iterator(DataConfig(sequence_length=8, seed=seed)), 12) for seed in (0, 1, 2)]
    assert all(other != first for other in others)
    plain = _take(_iterator(DataConfig(sequence_length=8, shuffle=False)), 12)
    assert _joined(plain) == [i % ROWS for i in range(48)]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_processes(process_count: int) -> None:
    shares = [_iterator(process_index=p, process_count=process_count) for p in range(process_count)]
    steps = zip(*[_take(share, 20) for share in shares])
    assert [_joined(step) for step in steps] == _take(_iterator(), 20)
    assert all(share.get_state() == shares[0].get_state() for share in shares)


@given(before=st.integers(0, 20), prefetch=st.integers(0, 5), process_count=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=20)
def test_resume_is_exact(before: int, prefetch: int, process_count: int) -> None:
    """Mid-epoch and across epochs (23 rows, so an epoch ends within a batch), with another number of processes."""
    config = DataConfig(sequence_length=8, seed=3, prefetch=prefetch)
    first = _iterator(config)
    _take(first, before)
    state = json.loads(json.dumps(first.get_state()))
    expected = _take(first, 8)
    for p in range(process_count):
        resumed = _iterator(config, process_index=p, process_count=process_count)
        _take(resumed, 2)  # so that it has read ahead elsewhere
        resumed.set_state(state)
        share = 4 // process_count
        assert _take(resumed, 8) == [ids[p * share : (p + 1) * share] for ids in expected]
        resumed.close()
    first.close()


def test_resume_with_another_batch_size_repeats_and_skips_nothing() -> None:
    first = _iterator(global_batch_size=4)
    _take(first, 3)
    resumed = _iterator(global_batch_size=6)
    resumed.set_state(first.get_state())
    assert _joined(_take(resumed, 2)) == _joined(_take(first, 3))


def test_rows_left_out_are_left_out_of_batches_of_another_size() -> None:
    iterator, whole = _iterator(global_batch_size=6), _iterator(global_batch_size=6)
    iterator.skip({8, 9, 10, 11})  # a batch of four
    kept = _take(whole, 3)
    assert _joined(_take(iterator, 2)) == _joined([kept[0], kept[2]])
    assert iterator.next_row == 18


def test_state_of_other_data_is_refused() -> None:
    state = _iterator().get_state()
    for config in (DataConfig(sequence_length=8, seed=4), DataConfig(sequence_length=9, seed=3)):
        with pytest.raises(UserError, match="the data has changed since this state was saved"):
            _iterator(config).set_state(state)


def _goes_on(
    first: TrainIterator, store: TokenStore, config: DataConfig, batch: int, processes: int
) -> dict[str, object]:
    """Compare the next batches with those of so many processes that go on from the same state, which is returned."""
    state = json.loads(json.dumps(first.get_state()))
    expected = _held(itertools.islice(first, 3))
    shares = []
    for p in range(processes):
        resumed = train_iterator(store, config, global_batch_size=batch, process_index=p, process_count=processes)
        resumed.set_state(state)
        shares.append([_held([batch]) for batch in itertools.islice(resumed, 3)])
    assert [row for step in zip(*shares) for share in step for row in share] == expected
    return state


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("split", ["long", "never"])
def test_packed_documents_resume_exactly(process_count: int, split: str) -> None:
    store = make_store([7, 20, 3, 41, 16, 9, 30, 2, 55] * 3)
    config = DataConfig(sequence_length=12, packing="best_fit", split=split, seed=3)
    first = train_iterator(store, config, global_batch_size=4)
    _held(itertools.islice(first, 5))
    state = _goes_on(first, store, config, 4, process_count)
    for other in ({"split": "long" if split == "never" else "never"}, {"packing": "concatenate", "split": "long"}):
        with pytest.raises(UserError, match="the data has changed since this state was saved"):
            train_iterator(store, config.model_copy(update=other), global_batch_size=4).set_state(state)
    batches = validation_batches(store, config, global_batch_size=4)
    assert sum(batch["loss_mask"].sum() for batch in batches) == store.num_targets, "none of them is left out"


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_validation_is_one_ordered_pass(process_count: int) -> None:
    def share(p: int, **options: int) -> list[Batch]:
        sizes = {"global_batch_size": 4, "process_index": p, "process_count": process_count}
        return list(validation_batches(STORE, CONFIG, **sizes | options))

    steps = list(zip(*[share(p) for p in range(process_count)], strict=True))
    joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps]
    assert len(joined) == 6
    assert all(values.shape == (4, 8) for batch in joined for values in batch.values())
    assert _joined(map(_ids, joined))[:ROWS] == list(range(ROWS))
    assert all((values[ROWS % 4 :] == 0).all() for values in joined[-1].values())
    assert sum(batch["loss_mask"].sum() for batch in joined) == STORE.num_tokens - STORE.num_documents
    assert len(share(0, max_batches=2)) == 2
    assert len(share(0, max_batches=9)) == 6


def test_user_errors() -> None:
    for make in (train_iterator, validation_batches):
        with pytest.raises(UserError, match="a global batch of 4 does not divide among 3 processes"):
            make(STORE, CONFIG, global_batch_size=4, process_count=3)
    with pytest.raises(UserError, match="183 training tokens make 23 rows of 8, fewer than the 24 of one batch"):
        _iterator(global_batch_size=24)


def test_one_row_is_enough() -> None:
    iterator = train_iterator(make_store([5]), CONFIG, global_batch_size=1)
    assert [next(iterator)["tokens"][0, :5].tolist() for _ in range(3)] == [[1, 2, 3, 4, 0]] * 3


def test_a_process_ends_while_reading_ahead() -> None:
    code = """
import numpy as np
from trainfw.data import DataConfig, TokenStore, train_iterator
store = TokenStore(np.arange(100), np.array([0, 100]), 100, "")
iterator = train_iterator(store, DataConfig(sequence_length=8, prefetch=16), global_batch_size=4)
next(iterator)
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


EXAMPLES = TokenStore(STORE.tokens, STORE.offsets, 183, "examples", np.arange(183) % 3 == 1)


def _held(batches: Iterable[Batch]) -> list[list[int]]:
    """The tokens of each row of each batch."""
    return [row.tolist() for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("process_count", [1, 2])
def test_examples_come_in_order_and_resume_exactly(process_count: int) -> None:
    config = DataConfig(sequence_length=60, format="chat", seed=3)
    rows = ExampleRows(EXAMPLES, 60)
    first = train_iterator(EXAMPLES, config, global_batch_size=2)
    epochs = 2  # of 4 rows, in 4 batches
    seen = _held(itertools.islice(first, len(rows) * epochs // 2))
    assert Counter(map(tuple, seen)) == Counter({tuple(rows[i]["tokens"]): epochs for i in range(len(rows))})
    state = _goes_on(first, EXAMPLES, config, 2, process_count)
    with pytest.raises(UserError, match="the data has changed"):
        train_iterator(STORE, config, global_batch_size=2).set_state(state)
    batches = list(validation_batches(EXAMPLES, config, global_batch_size=3))
    assert (
        sum(batch["loss_mask"].sum() for batch in batches) == EXAMPLES.num_targets - 1
    )  # one document's first is among them
