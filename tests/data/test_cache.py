import gzip
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from trainfw.data import DataConfig, PreparedData, cache, prepare, sources
from trainfw.data.cache import is_held_out
from trainfw.errors import UserError
from trainfw.paths import cache_dir


def _documents(prepared: PreparedData, split: str) -> list[str]:
    store = getattr(prepared, split)
    bounds = zip(store.offsets[:-1], store.offsets[1:])
    documents = [store.tokens[start:end].tolist() for start, end in bounds]
    tokenizer = prepared.tokenizer
    assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in documents)
    return [tokenizer.decode(ids) for ids in documents]


def _forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an input was read")

    monkeypatch.setattr(sources.Source, "documents", refuse)


@pytest.mark.parametrize("tokenizer", [{"name": "bytes"}, {"name": "bpe", "vocab_size": 300}])
def test_both_splits_hold_the_text(config: DataConfig, tokenizer: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(**config.model_dump() | {"tokenizer": tokenizer})
    prepared = prepare(config)
    texts = [document.text for document in sources.open_source(config).documents()]
    held_out = [text for text in texts if is_held_out(text, 0.1)]
    assert _documents(prepared, "validation") == held_out
    assert _documents(prepared, "train") == [text for text in texts if text not in held_out]
    assert prepared.validation.num_bytes == sum(len(text.encode()) for text in held_out)
    assert prepared.train.num_bytes + prepared.validation.num_bytes == sum(len(text.encode()) for text in texts)
    assert prepared.gzip_bits_per_byte is None  # of so little text it is mostly its own header
    monkeypatch.setattr(cache, "GZIP_BYTES", 1)
    prepared = prepare(config)
    compressed = gzip.compress("".join(held_out).encode(), 9)
    assert prepared.gzip_bits_per_byte == pytest.approx(8 * len(compressed) / prepared.validation.num_bytes)


def test_second_time_reads_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(**config.model_dump() | {"tokenizer": {"name": "bpe", "vocab_size": 300}})
    first = prepare(config)
    _forbid_reading(monkeypatch)
    second = prepare(DataConfig(**config.model_dump() | {"sequence_length": 7, "seed": 1, "prefetch": 0}))
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert second.train.tokens[:].tolist() == first.train.tokens[:].tolist()
    assert (second.gzip_bits_per_byte, second.train.digest) == (first.gzip_bits_per_byte, first.train.digest)


@pytest.mark.parametrize(
    "change",
    [{"validation_fraction": 0.2}, {"max_documents": 100}, {"tokenizer": {"name": "bpe", "vocab_size": 300}}],
    ids=lambda change: next(iter(change)),
)
def test_options_that_shape_the_tokens(config: DataConfig, change: dict) -> None:
    first = prepare(config)
    second = prepare(DataConfig(**config.model_dump() | change))
    assert (second.fingerprint, second.train.digest) != (first.fingerprint, first.train.digest)
    assert prepare(config).train.digest == first.train.digest


def test_changed_input_is_read_again(config: DataConfig, corpus: Path) -> None:
    first = prepare(config)
    text = corpus.read_text().replace("Document 1:", "Document X:")
    corpus.write_text(text)
    second = prepare(config)
    assert second.fingerprint != first.fingerprint
    assert any("Document X" in text for split in ("train", "validation") for text in _documents(second, split))


def test_same_text_elsewhere_has_the_same_digest(config: DataConfig, corpus: Path) -> None:
    first = prepare(config)
    os.utime(corpus, ns=(0, 0))
    second = prepare(config)
    assert second.fingerprint != first.fingerprint
    assert second.train.digest == first.train.digest


@pytest.mark.parametrize("damage", ["cut", "odd", "empty", "gone", "meta", "tokenizer", "pipes"])
def test_damaged_cache_is_rebuilt(config: DataConfig, damage: str) -> None:
    first = prepare(config)
    tokens = first.train.tokens[:].tolist()
    assert config.cache_dir
    directory = Path(config.cache_dir) / first.fingerprint
    file = directory / "train.tokens"
    match damage:
        case "cut":
            os.truncate(file, file.stat().st_size - 2)
        case "odd":
            os.truncate(file, file.stat().st_size - 1)
        case "empty":
            os.truncate(directory / "validation.offsets", 0)
        case "gone":
            (directory / "validation.tokens").unlink()
        case "meta":
            (directory / "meta.json").write_text('{"train": {')
        case "tokenizer":
            (directory / "tokenizer" / "tokenizer.json").write_text("{}")
        case "pipes":  # which nobody writes to
            for name in ("train.tokens", "meta.json"):
                (directory / name).unlink()
                os.mkfifo(directory / name)
                assert prepare(config).damage
    assert prepare(config).train.tokens[:].tolist() == tokens


def test_interrupted_build_leaves_nothing_in_the_way(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("trainfw.data.store.StoreWriter.info", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    assert prepare(config).train.num_documents > 100


def test_what_counts_as_whole_is_on_the_disk(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync, rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def move(path: Path, target: Path) -> None:
        if path.is_dir():
            files = [path, *path.rglob("*")]
            assert len(files) > 5
            assert {file.stat().st_ino for file in files} <= {*synced}
            synced.clear()
        rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", move)
    prepare(config)
    assert synced == [Path(config.cache_dir or "").stat().st_ino]


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document {i % 40}"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = str(tmp_path / "a.jsonl")
    prepared = prepare(
        DataConfig(source=source, sequence_length=8, validation_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    )
    train, validation = set(_documents(prepared, "train")), set(_documents(prepared, "validation"))
    assert len(train | validation) == 40
    assert not train & validation
    assert prepared.train.num_documents + prepared.validation.num_documents == 400


def test_split_does_not_depend_on_the_rest() -> None:
    texts = [f"text {i}" for i in range(20_000)]
    held_out = {text for text in texts if is_held_out(text, 0.02)}
    assert 300 < len(held_out) < 500
    assert held_out < {text for text in texts if is_held_out(text, 0.05)}


def test_a_split_cannot_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("only one")
    config = DataConfig(source=str(tmp_path / "a.txt"), sequence_length=8, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"validation_fraction = 0.02: the validation split is empty, of 1 document"):
        prepare(config)


def test_unwritable_cache(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token cache in .*; name another in data.cache_dir"):
        prepare(DataConfig(**config.model_dump() | {"cache_dir": str(tmp_path / "file" / "cache")}))


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/trainfw")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "trainfw"


def test_progress(config: DataConfig) -> None:
    calls: list[tuple[str, int, int | None]] = []
    prepare(config, progress=lambda *call: calls.append(call))
    assert calls[0] == ("Tokenising, MB", 1, None)
    assert calls[-1] == ("Tokenising, MB", 1, 1)


def _prepare_slowly(config: DataConfig, builds: str) -> None:
    from trainfw.data import cache

    build = cache._Cache._build

    def slow(*arguments: object) -> None:
        with open(builds, "a") as file:
            file.write("built\n")
        time.sleep(0.5)
        build(*arguments)  # type: ignore[arg-type]

    cache._Cache._build = slow  # type: ignore[assignment,method-assign]
    cache.prepare(config)


def test_one_of_many_processes_builds(config: DataConfig, tmp_path: Path) -> None:
    builds = tmp_path / "builds"
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_prepare_slowly, args=(config, str(builds))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert builds.read_text() == "built\n"


def test_directories_alike_but_for_their_text_do_not_share_a_cache(tmp_path):
    """Same names, sizes and times, as images and archives make them."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            file = tmp_path / name / f"{number}.txt"
            file.write_text(f"{name} is the text of document {number:02}")
            os.utime(file, (0, 0))
    texts = []
    for name in ("a", "b"):
        config = DataConfig(
            source=str(tmp_path / name),
            sequence_length=8,
            validation_fraction=0.3,
            cache_dir=str(tmp_path / "cache"),
        )
        data = prepare(config)
        texts.append(data.tokenizer.decode(data.train.tokens[:].tolist()))
    assert texts[0].startswith("a is")
    assert texts[1].startswith("b is")
