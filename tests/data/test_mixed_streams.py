import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from trainfw.data import DataConfig, MixedRows, MixedStreamBatches, Shares, StageShares, StreamedRows, byte_tokenizer
from trainfw.errors import UserError

STAGES = [
    StageShares(("code", "prose"), Shares.of([3.0, 1.0]), 4, 16),
    StageShares(("code", "prose"), Shares.of([1.0, 1.0], [0.0, 1.0], 24), 8, 16),
]
STEPS = (6, 3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory = tmp_path_factory.mktemp("streams")
    for name, letters in (("code", "abcdefgh"), ("prose", "ABCDEFGH")):
        (directory / name).mkdir()
        for letter in letters:
            (directory / name / f"{letter}.txt").write_text(letter * 90)
    mixture = {name: {"source": str(directory / name)} for name in ("code", "prose")}
    stream = {"window": 8, "cache_bytes": 0}
    given = {"mixture": mixture, "stream": stream, "sequence_length": 16, "validation_fraction": 0.01}
    return DataConfig.model_validate(given | {"cache_dir": str(directory / "cache")})


def batches_of(config: DataConfig, process: int = 0, processes: int = 1) -> MixedStreamBatches:
    streams = {name: StreamedRows(part, byte_tokenizer()) for name, part in config.parts.items()}
    return MixedStreamBatches(MixedRows(streams, STAGES), STAGES, process, processes)


def drawn(batches: MixedStreamBatches, done: int = 0) -> Iterator[np.ndarray]:
    for step in range(done, sum(STEPS)):
        batches.enter(int(step >= STEPS[0]))
        yield next(batches)["tokens"]
    batches.close()


def sources(rows: np.ndarray) -> np.ndarray:
    """0 for a row of code, 1 for one of prose: by the case of its letters."""
    letters = [next(chr(token) for token in row if token < 128) for row in rows]
    return np.array([letter.isupper() for letter in letters], int)


def test_streams_are_mixed_by_the_shares_of_each_stage_with_any_number_of_processes(config):
    whole = [*drawn(batches_of(config))]
    assert [batch.shape for batch in whole] == [(4, 16)] * 6 + [(8, 16)] * 3
    assert np.bincount(sources(np.concatenate(whole[:6]))).tolist() == [18, 6]
    assert np.bincount(sources(np.concatenate(whole[6:]))).tolist() == [6, 18]
    shares = [[*drawn(batches_of(config, process, 4))] for process in range(4)]
    for step, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), expected)


@pytest.mark.parametrize("done", [1, 6, 8])
def test_it_goes_on_from_any_step(config, done):
    whole = [*drawn(batches_of(config))]
    before = batches_of(config)
    [*itertools.islice(drawn(before), done)]
    state, after = before.get_state(), batches_of(config)
    after.set_state(state)
    before.close()
    for found, expected in zip(drawn(after, done), whole[done:], strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="are not those that the run had"):
        after.set_state({**state, "rows": {**state["rows"], "shares": "others"}})
