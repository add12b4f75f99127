import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainfw.data import DataConfig, MixedIterator, MixedStage, Rows, Shares, TokenStore, with_all_classes
from trainfw.data.images.prepared import PreparedImages
from trainfw.data.images.store import ImageStore
from trainfw.errors import UserError

NAMES = ("code", "prose", "web")


def store(source: int, rows: int, length: int = 4) -> TokenStore:
    """One document of as many rows; each token says its source and its place."""
    tokens = np.arange(rows * length + 1, dtype=np.uint32) + 10_000 * (source + 1)
    return TokenStore(tokens, np.array([0, len(tokens)]), len(tokens), f"{source} {rows}")


def stage(weights: dict[str, float], rows: int, batch: int = 4, length: int = 4, end: object = None) -> MixedStage:
    sizes = {"code": 7, "prose": 11, "web": 64}
    stores = {name: Rows(store(NAMES.index(name), sizes[name]), length) for name in weights}
    return MixedStage(tuple(weights), Shares.of([*weights.values()], end, rows), batch, length, stores)


STAGES = [
    stage({"code": 3.0, "prose": 1.0}, 40),
    stage({"code": 1.0, "prose": 1.0, "web": 0.0}, 24, end=[0.0, 1.0, 2.5]),
    stage({"web": 1.0, "code": 0.125}, 16, batch=8, length=8),
]
STEPS = (10, 6, 2)


def iterator(
    process: int = 0, processes: int = 1, stages: list[MixedStage] = STAGES, **options: object
) -> MixedIterator:
    config = DataConfig(sequence_length=4, **{"prefetch": 0, "seed": 5} | options)
    return MixedIterator(stages, config, process, processes)


def batches(one: MixedIterator, done: int = 0) -> Iterator[np.ndarray]:
    """The batches of the steps after `done`, each of its stage."""
    ends = list(itertools.accumulate(STEPS))
    for step in range(done, ends[-1]):
        one.enter(next(i for i, end in enumerate(ends) if step < end))
        yield next(one)["tokens"]


WHOLE = [*batches(iterator())]


def test_each_stage_has_its_rows_and_its_shares():
    assert [batch.shape for batch in WHOLE] == [(4, 4)] * 16 + [(8, 8)] * 2
    first = np.concatenate(WHOLE[:10])[:, 0] // 10_000
    assert np.bincount(first).tolist() == [0, 30, 10]
    last = np.concatenate(WHOLE[16:])[:, 0] // 10_000
    assert np.bincount(last).tolist() == [0, 2, 0, 14]


def test_a_source_is_seen_whole_before_it_begins_again_and_goes_on_at_a_border():
    code = [row[0] for batch in WHOLE[:16] for row in batch if row[0] < 20_000]
    passes = [sorted(code[i : i + 7]) for i in range(0, len(code) - 6, 7)]
    assert len(passes) >= 4  # of which one lies across the border
    assert all(one == [10_000 + 4 * i for i in range(7)] for one in passes)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_reads_the_same_rows(processes):
    shares = [[*batches(iterator(p, processes))] for p in range(processes)]
    for step, expected in enumerate(WHOLE):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, len(WHOLE)), st.sampled_from([1, 2, 4]))
def test_it_goes_on_from_any_step_with_any_number_of_processes(done, processes):
    before = iterator()
    for _ in itertools.islice(batches(before), done):
        pass
    shares = []
    for process in range(processes):
        after = iterator(process, processes)
        after.set_state(before.get_state())
        shares.append([*batches(after, done)])
    for step, expected in enumerate(WHOLE[done:]):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), expected)


def test_reading_ahead_in_threads_changes_nothing():
    one = iterator(prefetch=3)
    for found, expected in zip(batches(one), WHOLE):
        np.testing.assert_array_equal(found, expected)
    one.close()


def test_rows_that_are_left_out_are_passed_over():
    one = iterator()
    one.skip({5})
    np.testing.assert_array_equal(next(one)["tokens"], WHOLE[0])
    np.testing.assert_array_equal(next(one)["tokens"], WHOLE[2])


def test_later_stages_may_change_and_the_current_one_may_not():
    before = iterator()
    for _ in itertools.islice(batches(before), 12):
        pass
    state = before.get_state()
    iterator(stages=[*STAGES[:2], stage({"prose": 1.0}, 99)]).set_state(state)
    for others in (STAGES[:1], [STAGES[0], STAGES[2]]):
        with pytest.raises(UserError, match=r"are not those that the run had"):
            iterator(stages=others).set_state(state)
    with pytest.raises(UserError, match=r"mixture\.(code|prose): has changed since"):
        iterator(seed=6).set_state(state)


def pictures(classes: tuple[str, ...], labels: list[int]) -> PreparedImages:
    one = ImageStore(np.zeros(len(labels) * 4, np.uint8), (2, 2, 1), "pixels", np.array(labels, np.int32))
    return PreparedImages(one, one, classes, "")


def test_sources_of_pictures_number_their_classes_alike():
    parts = with_all_classes({"a": pictures(("cat", "dog"), [0, 1, 1]), "b": pictures(("bird", "dog"), [0, 1])})
    assert {part.classes for part in parts.values()} == {("cat", "dog", "bird")}
    assert parts["a"].train.labels[:].tolist() == [0, 1, 1]
    assert parts["b"].train.labels[:].tolist() == [2, 1]
    assert parts["b"].train.digest != "pixels"


def test_a_source_takes_what_it_leaves_out_from_the_mixture():
    given = {"code": {"source": "a", "text_field": "content"}, "chats": {"source": "b", "format": "chat"}}
    config = DataConfig.model_validate({"mixture": given, "sequence_length": 8, "text_field": "body"})
    parts = config.parts
    assert (parts["code"].text_field, parts["chats"].text_field) == ("content", "body")
    assert (parts["code"].format, parts["chats"].format) == ("text", "chat")
    assert parts["code"].sequence_length == 8
    assert DataConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match="remove one of source and mixture"):
        DataConfig.model_validate({"mixture": given, "sequence_length": 8, "source": "c"})
