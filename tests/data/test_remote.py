"""Files of stores: fsspec's memory:// stands for one, and one test has a real S3 server."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import fsspec
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.s3_server import BUCKET, serving
from trainfw import RunError, UserError
from trainfw.data import DataConfig, open_source, prepare, remote
from trainfw.data.images.sources import open_pictures


def lines(first: int, last: int) -> bytes:
    return "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(first, last)).encode()


def table(first: int, last: int) -> bytes:
    file = io.BytesIO()
    texts = pyarrow.table({"text": [f"document {i}" for i in range(first, last)]})
    pyarrow.parquet.write_table(texts, file, row_group_size=7)
    return file.getvalue()


FILES = {
    "a.jsonl": lines(0, 30),
    "b.jsonl.gz": gzip.compress(lines(30, 60)),
    "deep/c.parquet": table(60, 90),
    "deep/er/d.json": json.dumps([{"text": "document 90"}]).encode(),
    "deep/e.txt": b"document 91",
    "deep/f.csv": b"",
    ".hidden/g.txt": b"hidden",
}


@pytest.fixture
def store(tmp_path: Path) -> fsspec.AbstractFileSystem:
    """A store with these files; below `tmp_path`, the same ones."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name, data in FILES.items():
        store.pipe(f"/texts/{name}", data)
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(data)
    return store


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)
    for name in ("START_SECONDS", "HUB_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(remote, name, 0.02)


def named(source: object, **options: object) -> DataConfig:
    return DataConfig(**{"source": source, "sequence_length": 8, **options})


@pytest.mark.parametrize("within", ["", "a.jsonl", "*.jsonl*", "deep", "**/*.parquet", "deep/*/d.json"])
def test_a_store_is_read_like_a_directory(within: str, store: object, tmp_path: Path) -> None:
    here = open_source(named(str(tmp_path / "texts" / within)))
    there = open_source(named(f"memory://texts/{within}"))
    assert [item.name for item in there.inputs] == [item.name for item in here.inputs]
    assert there.skipped == here.skipped
    assert list(there.documents()) == list(here.documents())


def test_blocks_join(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(open_source(named("memory://texts/")).documents())
    monkeypatch.setattr(remote, "BLOCK", 100)
    assert list(open_source(named("memory://texts/")).documents()) == whole


def test_the_tokens_are_made_once_for_the_same_contents(store: MemoryFileSystem, tmp_path: Path) -> None:
    config = named("memory://texts/", cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    first = prepare(config)
    assert first.train.num_documents > 60
    assert open_source(config).fingerprint() == open_source(config).fingerprint()
    store.pipe("/texts/a.jsonl", lines(100, 130))
    assert prepare(config).fingerprint != first.fingerprint


def test_what_changes_while_it_is_read_is_an_error(store: MemoryFileSystem) -> None:
    source = open_source(named("memory://texts/"))
    store.pipe("/texts/b.jsonl.gz", gzip.compress(lines(30, 40)))
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: has changed since it was listed: .* bytes .* then, .* now"):
        list(source.documents())
    store.rm("/texts/b.jsonl.gz")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: is not there"):
        list(source.documents())


class Flaky:
    """Answers of a store, some of which fail or are cut short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, problem: Exception | int) -> None:
        whole = MemoryFileSystem.cat_file
        self.left = times

        def cat_file(store: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
            if self.left:
                self.left -= 1
                if isinstance(problem, Exception):
                    raise problem
                end -= problem
            return whole(store, path, start, end)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


@pytest.mark.parametrize("problem", [OSError("reset by peer"), TimeoutError(), 5])
def test_a_store_that_fails_is_asked_again(
    problem: Exception | int, store: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Flaky(monkeypatch, 3, problem)
    assert len(list(open_source(named("memory://texts/*.jsonl*")).documents())) == 60
    warned, answered = caplog.messages
    assert re.search(r"a\.jsonl: no answer \(.*\); trying again for", warned)
    assert "answers again, after" in answered


def test_patience_ends(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    Flaky(monkeypatch, 10**6, 5)
    with pytest.raises(RunError, match=r"tried for .*: EOFError: .* bytes where .* were asked for: it was cut short"):
        list(open_source(named("memory://texts/")).documents())


def test_no_patience_with_what_stays_so(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    Flaky(monkeypatch, 1, PermissionError("Forbidden"))
    with pytest.raises(UserError, match=r"d\.json: the store refuses it \(Forbidden\); look at the credentials"):
        open_source(named("memory://texts/"))  # which looks for rows in .json, and leaves out what has none
    NoCredentialsError = type("NoCredentialsError", (Exception,), {})
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_: (_ for _ in ()).throw(NoCredentialsError("Unable")))
    with pytest.raises(UserError, match=r"no credentials \(Unable\); set those of the store in the environment"):
        open_source(named("memory://texts/"))


@pytest.mark.parametrize(
    ("source", "message"),
    {
        "memory://texts/deep/c.parque": r"does not exist; did you mean 'memory:///texts/deep/c\.parquet'\?",
        "memory://texts/*.md": "matches no file$",
        "memory://texts/deep/f.csv": "cannot read a .csv file",
        "memory://texts/de*/f.csv": r"no file that can be read \(one of .*; found \.csv",
        "s4://texts": "unknown protocol 's4'; one of: s3, gs, hf, abfs, https",
        "gs://texts/": 'gs:// needs another package: pip install "gcsfs',
        "zip://a.jsonl::s3://texts/a.zip": "chains of URLs are not read",
    }.items(),
)
def test_what_cannot_be_read_is_refused(source: str, message: str, store: object) -> None:
    with pytest.raises(UserError, match=message):
        open_source(named(source))


def test_a_saved_dataset_of_a_store_is_refused(store: MemoryFileSystem) -> None:
    store.pipe("/texts/saved/state.json", b"{}")
    with pytest.raises(UserError, match=r"saved/state\.json is of a dataset that `save_to_disk` wrote"):
        open_source(named("memory://texts"))


def test_of_pictures_tars_alone(store: MemoryFileSystem) -> None:
    store.pipe("/pictures/a.tar", b"")
    config = DataConfig(source="memory://pictures/*.tar", format="images")
    assert [item.name for item in open_pictures(config).inputs] == ["a.tar"]
    store.pipe("/pictures/b.png", b"")
    with pytest.raises(UserError, match=r"b\.png: of pictures in a store, webdataset's \.tar alone are read"):
        open_pictures(config.model_copy(update={"source": "memory://pictures/"}))


def test_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    where = re.escape(f"nor is all of it in the hub's cache on this machine ({tmp_path})")
    with pytest.raises(UserError, match=where):
        open_source(named("hf://datasets/some/texts/a.jsonl"))
    commit = "0123456789" * 4
    place = tmp_path / "datasets--some--texts"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit / "a.jsonl").write_bytes(lines(0, 30))
    assert len(list(open_source(named("hf://datasets/some/texts/a.jsonl")).documents())) == 30
    with pytest.raises(UserError, match=where):
        open_source(named("hf://datasets/some/texts/b.jsonl"))


def test_s3() -> None:
    """A real server: its ETags, and that it goes away and comes back."""
    with serving() as server:
        for name in ("a.jsonl", "b.jsonl.gz", "deep/c.parquet"):
            server.put(f"texts/{name}", FILES[name])
        source = open_source(named(f"s3://{BUCKET}/texts/"))
        assert [item.name for item in source.inputs] == ["a.jsonl", "b.jsonl.gz", "deep/c.parquet"]
        documents = source.documents()
        next(documents)
        assert len([*documents]) == 89
        fingerprint = source.fingerprint()
        server.put("texts/a.jsonl", FILES["a.jsonl"])  # the same contents at another time
        assert open_source(named(f"s3://{BUCKET}/texts/")).fingerprint() == fingerprint
        with pytest.raises(UserError, match="nobucket/' does not exist"):
            open_source(named("s3://nobucket/"))
        server.tell("stop")
        with pytest.raises(UserError, match="cannot be read, tried for 0 s: EndpointConnectionError"):
            open_source(named(f"s3://{BUCKET}/texts/"))
        server.tell("start")
        server.put("texts/b.jsonl.gz", b"")
        with pytest.raises(UserError, match=r"b\.jsonl\.gz: has changed since it was listed"):
            list(source.documents())
