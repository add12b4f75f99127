"""A cache on a disk that loses, flips or mixes up what was written: the same rows, or an error."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainfw.data import DataConfig, PreparedData, cache, open_rows, prepare, train_iterator
from trainfw.data.store import BLOCK
from trainfw.errors import RunError, UserError

KINDS = ("flip", "zero", "noise", "cut", "longer", "swap", "another's", "gone")


@pytest.fixture(scope="module", params=["text", "prompt_completion", "preferences"])
def whole(request, tmp_path_factory) -> tuple[DataConfig, Path, list[bytes]]:
    """A config, a copy of its cache, and the rows in it."""
    directory = tmp_path_factory.mktemp("whole")
    words = random.Random(0)
    rows = [
        {key: " ".join(str(words.random()) for _ in range(words.randint(1, 20))) for key in keys}
        for keys in [("text", "prompt", "completion", "chosen", "rejected")] * 200
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        source=str(directory / "rows.jsonl"),
        format=request.param,
        chat_template=request.param == "text",
        sequence_length=1000,
        validation_fraction=0.4,
        cache_dir=str(directory / "cache"),
    )
    expected = rows_of(prepare(config))
    shutil.copytree(directory / "cache", directory / "copy")
    return config, directory / "copy", expected


@pytest.fixture
def fresh(whole) -> tuple[DataConfig, Path, list[bytes]]:
    return renewed(whole)


def renewed(whole) -> tuple[DataConfig, Path, list[bytes]]:
    """The cache as it was; its directory in place of the copy's."""
    config, copy, expected = whole
    shutil.rmtree(config.cache_dir)
    shutil.copytree(copy, config.cache_dir)
    (directory,) = (path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    return config, directory, expected


def rows_of(data: PreparedData) -> list[bytes]:
    config = DataConfig(sequence_length=1000)
    parts = [open_rows(store, config) for store in (data.train, data.validation)]
    return [b"".join(row.tobytes() for row in rows[i].values()) for rows in parts for i in range(len(rows))]


def damage(file: Path, kind: str, at: float) -> None:
    """`at`: where, from 0 to 1."""
    data = bytearray(file.read_bytes())
    place = int(at * (len(data) - 1))
    length = min(300, len(data) - place)
    match kind:
        case "flip" if data:  # not cut to nothing before
            data[place] ^= 1 << (place % 8)
        case "zero":
            data[place : place + length] = bytes(length)
        case "noise":  # ids out of range among it
            data[place : place + length] = b"\xff" * length
        case "cut":
            del data[place:]
        case "longer":
            data += b"\0" * length
        case "swap" if len(data) > 2 * BLOCK:
            data[:BLOCK], data[BLOCK : 2 * BLOCK] = data[BLOCK : 2 * BLOCK], data[:BLOCK]
    if kind == "gone":
        file.unlink()
    elif kind == "another's":
        for other in file.parent.glob(f"*{file.suffix}"):
            if other != file:
                data = bytearray(other.read_bytes())
        file.write_bytes(data)
    else:
        with file.open("r+b") as same:  # in place, as a disk does
            same.truncate(len(data))
            same.write(data)


@given(st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_changes_nothing_or_is_an_error(whole, data):
    config, directory, expected = renewed(whole)
    source, hidden = Path(config.source), Path(f"{config.source}.hidden")
    opened = prepare(config) if data.draw(st.booleans(), "open") else None
    if opened is not None and data.draw(st.booleans(), "read"):
        rows_of(opened)
    for _ in range(data.draw(st.integers(1, 3), "times")):
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        damage(data.draw(st.sampled_from(files)), data.draw(st.sampled_from(KINDS)), data.draw(st.floats(0, 1)))
    there = data.draw(st.booleans(), "source")
    if not there:
        source.rename(hidden)
    try:
        found = prepare(config) if opened is None else opened
        assert rows_of(found) == expected
    except (UserError, RunError):
        if there:  # it can be made again, whatever became of it
            raise
    finally:
        if not there:
            hidden.rename(source)


def test_each_kind_of_damage_is_seen(whole):
    for kind in KINDS:
        config, directory, expected = renewed(whole)
        data = prepare(config)
        damage(directory / "train.tokens", kind, 0.5)
        assert rows_of(data) == expected, kind


def test_damage_in_the_middle_is_mended_once_and_said(fresh, caplog, monkeypatch):
    config, directory, rows = fresh
    undamaged = train_iterator(prepare(config).train, config, global_batch_size=2)
    expected = [next(undamaged) for _ in range(20)]
    undamaged.close()
    builds, build = [], cache._Cache._build

    def counted(*arguments: object) -> list[str]:
        builds.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(cache._Cache, "_build", counted)
    data, of_another_process = prepare(config), prepare(config)
    tokens = directory / "train.tokens"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    batches = train_iterator(data.train, config, global_batch_size=2)
    for batch in expected:
        for name, values in next(batches).items():
            np.testing.assert_array_equal(values, batch[name])
    batches.close()
    assert rows_of(of_another_process) == rows
    assert len(builds) == 1, "of several threads, processes and blocks"
    assert "train.tokens: block " in caplog.messages[0]
    assert caplog.messages[0].endswith(" is damaged; making the cache again from its source")
    assert not prepare(config).damage


def test_damage_at_the_start_is_said(fresh):
    config, directory, _ = fresh
    os.truncate(directory / "validation.offsets", 100)
    (note,) = [note for note in prepare(config).notes() if note.startswith("warning: ")]
    assert note.startswith("warning: the token cache was damaged, and was made again: ")
    assert "validation.offsets has 100 bytes, not " in note


@pytest.mark.parametrize(("source", "said"), [("gone", "does not exist"), ("other", "gives now is other data")])
def test_what_cannot_be_made_again_is_an_error(fresh, source, said):
    config, directory, _ = fresh
    data = prepare(config)
    file = Path(config.source)
    text, times = file.read_text(), file.stat()
    os.truncate(directory / "train.tokens", BLOCK)
    try:
        file.unlink() if source == "gone" else file.write_text(text[: text.rindex("{")])
        alone = config.model_copy(update={"prefetch": 0})  # no thread that is still at it once the source is back
        batches = train_iterator(data.train, alone, global_batch_size=2)
        with (
            contextlib.closing(batches),
            pytest.raises(RunError, match=rf"train\.tokens: block \d+ of \d+ is damaged, and cannot .*{said}"),
        ):
            list(itertools.islice(batches, 20))
        assert (directory / "train.tokens").stat().st_size == BLOCK, "what is left is left alone"
    finally:
        file.write_text(text)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
