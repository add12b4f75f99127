"""Streams of text from files: which rows, in which order, from which place, with how much on the disk."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainfw import RunError, UserError
from trainfw.data import (
    DataConfig,
    RowBatches,
    StreamedRows,
    TokenStore,
    byte_tokenizer,
    open_source,
    prepare,
    remote,
    streaming,
)
from trainfw.data.cache_directory import is_held_out
from trainfw.data.rows import FIELDS, Rows

from .test_remote import table

TOKENIZER = byte_tokenizer()
LENGTH = 16


def lines(first: int, last: int) -> bytes:
    return "".join(json.dumps({"text": f"{i}: " + f"word{i} " * (i % 7)}) + "\n\n" for i in range(first, last)).encode()


FILES = {
    "a.jsonl": lines(0, 200),
    "b.jsonl.gz": gzip.compress(lines(200, 400)),
    "c.parquet": table(400, 460),
    "d.json": json.dumps([{"text": f"document {i}"} for i in range(460, 480)]).encode(),
    "e.txt": b"document 480",
    "f.txt": b"",
}


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Iterator[None]:
    """No waits, and little text tokenised at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_FIRST_WAIT", 0.001)
        patch.setattr(streaming, "BATCH_BYTES", 3000)
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    for name, data in FILES.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def store() -> MemoryFileSystem:
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name, data in FILES.items():
        store.pipe(f"/texts/{name}", data)
    return store


def settings_of(source: object, directory: Path, stream: dict[str, Any] | None = None, **options: Any) -> DataConfig:
    stream = {"window": 100, "cache_bytes": 0, **(stream or {})}
    given = {"source": str(source), "sequence_length": LENGTH, "cache_dir": str(directory / "cache"), **options}
    return DataConfig(**{"validation_fraction": 0.1, **given, "stream": stream})


def drawn(config: DataConfig, count: int, state: dict[str, Any] | None = None) -> list[dict[str, np.ndarray]]:
    rows = StreamedRows(config, TOKENIZER)
    if state is not None:
        rows.set_state(json.loads(json.dumps(state)))
    found = [next(rows) for _ in range(count)]
    rows.close()
    return found


def same(some: list[dict[str, np.ndarray]], others: list[dict[str, np.ndarray]]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(one[name], other[name]) for one, other in zip(some, others) for name in FIELDS
    )


def packed(config: DataConfig) -> Rows:
    """The rows of one epoch in order, as those that are read before training are packed."""
    texts = [one.text for one in open_source(config).documents()]
    kept = [text for text in texts if not is_held_out(text, config.validation_fraction)]
    ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in kept]
    ends = np.cumsum([0, *map(len, ids)])
    return Rows(TokenStore(np.concatenate([*map(np.array, ids)]), ends, 0, ""), LENGTH)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_rows_are_those_of_text_read_before_training(kind: str, local: Path, store: object, tmp_path: Path) -> None:
    source = str(local) if kind == "local" else "memory://texts/"
    plain = settings_of(source, tmp_path, shuffle=False)
    rows = packed(plain)
    whole = [rows[i] for i in range(len(rows) - 1)]  # the last goes on in the next epoch
    assert same(drawn(plain, len(whole)), whole)

    mixed = drawn(settings_of(source, tmp_path, seed=7), len(whole))
    assert not same(mixed, whole)
    assert not same(mixed, drawn(settings_of(source, tmp_path, seed=8), len(whole)))
    assert same(mixed, drawn(settings_of(source, tmp_path, seed=7), len(whole)))


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(local: Path, tmp_path: Path) -> None:
    rows = StreamedRows(settings_of(local, tmp_path), TOKENIZER)
    texts = [one.text for one in open_source(settings_of(local, tmp_path)).documents()]
    kept = Counter(text for text in texts if not is_held_out(text, 0.1))
    assert 0 < kept.total() < len(texts)
    epochs: dict[int, list[str]] = {}
    for at, text in rows.corpus.documents(next(rows.corpus.documents(rows._begin[1][0]))[0]):
        if at.epoch == 3:
            break
        epochs.setdefault(at.epoch, []).append(text)
    rows.close()
    assert all(Counter(epoch) == kept for epoch in epochs.values())
    assert len({tuple(epoch) for epoch in epochs.values()}) == 3


@pytest.fixture(scope="module")
def straight(local: Path) -> list[dict[str, np.ndarray]]:
    return drawn(settings_of(local, local), 3000)


@settings(max_examples=12, deadline=None)
@given(at=st.integers(0, 2900))
def test_a_stream_goes_on_from_anywhere(at: int, local: Path, straight: list[Any]) -> None:
    rows = StreamedRows(settings_of(local, local), TOKENIZER)
    for _ in range(at):
        next(rows)
    state = rows.get_state()
    rows.close()
    assert len(json.dumps(state)) < 200
    assert same(drawn(settings_of(local, local), 100, state), straight[at : at + 100])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_has_the_same_batches(processes: int, local: Path, straight: list[Any]) -> None:
    config, half, state = settings_of(local, local), 20, None
    for first, count in ((0, half), (half, half)):  # of which the second go on from the state of process 0
        shares = []
        for process in range(processes):
            rows = StreamedRows(config, TOKENIZER)
            batches = RowBatches(rows, global_batch_size=8, process_index=process, process_count=processes)
            if state is not None:
                batches.set_state(state)
            shares.append([next(batches) for _ in range(count)])
            after = batches.get_state()
            batches.close()
        state = after
        for number, parts in enumerate(zip(*shares)):
            row = 8 * (first + number)
            for name in FIELDS:
                expected = np.stack([one[name] for one in straight[row : row + 8]])
                assert np.array_equal(np.concatenate([part[name] for part in parts]), expected)


def test_a_window_is_shuffled_and_no_more(local: Path, tmp_path: Path) -> None:
    count = 64 + 100 + 100
    mixed = drawn(settings_of(local, tmp_path), count)
    order = [row["tokens"].tobytes() for row in mixed]
    again = StreamedRows(settings_of(local, tmp_path), TOKENIZER)
    plain = [next(again._windows(0, again._begin[1])).rows[i]["tokens"].tobytes() for i in range(64)]
    again.close()
    assert order[:64] != plain
    assert sorted(order[:64]) == sorted(plain)


def test_held_out_documents_are_those_of_the_beginning(local: Path, tmp_path: Path) -> None:
    texts = {one.text for one in open_source(settings_of(local, tmp_path)).documents()}
    held = {text for text in texts if is_held_out(text, 0.1)}
    whole = prepare(settings_of(local, tmp_path))
    assert whole.validation.num_documents == len(held)
    assert whole.validation.num_bytes == sum(len(text.encode()) for text in held)
    some = prepare(settings_of(local, tmp_path, {"validation_bytes": 2000}, seed=9))
    assert 0 < some.validation.num_documents < len(held)
    assert some.validation.digest == prepare(settings_of(local, tmp_path, {"validation_bytes": 2000})).validation.digest
    with pytest.raises(UserError, match=r"the first 1 bytes of text \(stream\.validation_bytes\) have no held-out"):
        prepare(settings_of(local, tmp_path, {"validation_bytes": 1}, validation_fraction=1e-9))


def test_other_data_is_refused(store: MemoryFileSystem, tmp_path: Path) -> None:
    config = settings_of("memory://texts/", tmp_path)

    def open_batches(config: DataConfig) -> RowBatches:
        return RowBatches(StreamedRows(config, TOKENIZER), global_batch_size=4, process_index=0, process_count=1)

    batches = open_batches(config)
    next(batches)
    state = batches.get_state()
    batches.close()
    for other in ({"seed": 1}, {"shuffle": False}, {"validation_fraction": 0.2}, {"stream": {"window": 99}}):
        changed = open_batches(DataConfig(**{**config.model_dump(), **other}))
        with pytest.raises(UserError, match="the data has changed since this state was saved"):
            changed.set_state(state)
        changed.close()
    store.pipe("/texts/a.jsonl", lines(1, 200))
    changed = open_batches(config)
    with pytest.raises(UserError, match="the data has changed"):
        changed.set_state(state)
    changed.close()


def test_a_file_that_changes_ends_the_stream(local: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(0, 200))
    rows = StreamedRows(settings_of(tmp_path / "a.jsonl", tmp_path), TOKENIZER)
    (tmp_path / "a.jsonl").write_bytes(lines(0, 201))
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since it was listed"):
        list(itertools.islice(rows, 1000))
    rows.close()


def test_a_store_that_stays_away_loses_nothing(
    store: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings_of("memory://texts/", tmp_path, {"wait_seconds": 0.05})
    told: list[str] = []
    whole, away = MemoryFileSystem.cat_file, False

    def cat_file(store: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        if away:
            raise ConnectionError("no route to host")
        return whole(store, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    expected = drawn(config, 3000)
    rows = StreamedRows(config, TOKENIZER, report=told.append)
    batches = RowBatches(rows, global_batch_size=4, process_index=0, process_count=1)
    taken = [next(batches)]
    away = True
    for _ in range(2):  # also when it is asked again
        with pytest.raises(RunError, match=r"cannot be read, tried for .*: ConnectionError: no route to host"):
            taken.extend(batches)
    assert "no answer (ConnectionError: no route to host); trying again for 0.05 s" in told[0]
    state = batches.get_state()
    assert state["next_row"] == 4 * len(taken) < 2900
    batches.close()
    away = False
    after = drawn(config, 100, state["rows"])
    assert same(after, expected[4 * len(taken) :][:100])


def test_the_disk_holds_no_more_than_is_said(store: MemoryFileSystem, tmp_path: Path) -> None:
    limit = 2**18  # 4 blocks
    store.pipe("/texts/g.jsonl", big := lines(1000, 9000))
    assert len(big) > limit
    options: dict[str, Any] = {"sequence_length": 512}
    config = settings_of("memory://texts/", tmp_path, {"cache_bytes": limit}, **options)
    count = 2 * len(big) // 512
    bare = drawn(settings_of("memory://texts/", tmp_path, **options), count)
    blocks = tmp_path / "cache" / "blocks"
    rows, most, found = StreamedRows(config, TOKENIZER), 0, []
    for number in range(count):
        found.append(next(rows))
        if number % 20 == 0:
            most = max(most, sum(file.stat().st_size for file in blocks.iterdir()))
    rows.close()
    assert limit // 2 < most <= limit
    assert same(found, bare)
    for kept in blocks.glob("*.block"):
        kept.write_bytes(kept.read_bytes()[:-9] + b"!" * 9)  # damaged on the disk
    assert same(drawn(config, 500), bare[:500])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "chat"}, "documents alone are read as a stream, but format is 'chat'"),
        ({"tokenizer": {"name": "bpe", "vocab_size": 300}}, "trainfw tokenizer train"),
        ({"max_documents": 9}, "max_documents is for what is read before training"),
        ({"stream": {"window": 0}}, "window"),
    ],
)
def test_what_is_no_stream_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{"sequence_length": 8, "stream": {}, **options})


def test_where_nothing_is_left_to_learn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    rows = StreamedRows(settings_of(tmp_path / "a.txt", tmp_path), TOKENIZER)
    with pytest.raises(UserError, match="no document is left to train on"):
        next(rows)
    rows.close()
