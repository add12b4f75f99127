"""Interrupted tokenising, which goes on."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainfw.data import DataConfig, cache, encoding_processes, prepare, shards
from trainfw.errors import UserError

TOKENIZERS = [{"name": "bytes"}, {"name": "bpe", "vocab_size": 300}]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Shards of a few documents, of which many fit into the corpus."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 2000)
    monkeypatch.setattr(shards, "BATCH_BYTES", 300)


@pytest.fixture(params=TOKENIZERS, ids=lambda tokenizer: tokenizer["name"])
def settings(request, config: DataConfig) -> DataConfig:
    return config.model_copy(update={"tokenizer": type(config.tokenizer)(**request.param)})


def digests(config: DataConfig) -> dict[str, str]:
    files = [path for path in Path(config.cache_dir or "").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def elsewhere(config: DataConfig) -> DataConfig:
    return config.model_copy(update={"cache_dir": f"{config.cache_dir}-2"})


KILLED = """
import os, signal, sys
from trainfw.data import DataConfig, cache, encoding_processes, prepare, shards
cache.SHARD_BYTES, shards.BATCH_BYTES, encoding_processes.ALONE_BYTES = 2000, 300, 1000
encoding_processes._usable_cores = lambda: 2
save = shards.Shards.save
def save_and_die(self, number, shard):
    save(self, number, shard)
    if number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
shards.Shards.save = save_and_die
prepare(DataConfig.model_validate_json(sys.argv[1]))
"""


def test_killed_it_goes_on_to_the_same_bytes(settings, monkeypatch):
    whole = prepare(elsewhere(settings))
    for last in (0, 3):
        command = [sys.executable, "-c", KILLED, settings.model_dump_json(), str(last)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len(list(Path(settings.cache_dir or "").glob("*.shards/*.npz"))) == 4
    encoded, encode = [], encoding_processes.PieceEncoder.encode
    monkeypatch.setattr(
        encoding_processes.PieceEncoder, "encode", lambda self, pieces: encoded.extend(pieces) or encode(self, pieces)
    )
    calls: list[tuple[str, int, int | None]] = []
    data = prepare(settings, progress=lambda *call: calls.append(call))
    assert digests(settings) == digests(elsewhere(settings))
    assert data.train.digest == whole.train.digest
    assert calls[0][0] == "Reading what was tokenised, MB"
    assert sum(map(len, encoded)) < whole.train.num_bytes + whole.validation.num_bytes - 4 * 2000
    assert not list(Path(settings.cache_dir or "").glob("*.shards"))


def interrupted(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    with monkeypatch.context() as patch:
        patch.setattr("trainfw.data.store.StoreWriter.info", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    return sorted(Path(config.cache_dir or "").glob("*.shards/*.npz"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "other"])
def test_a_damaged_shard_is_made_again(config, damage, monkeypatch):
    prepare(elsewhere(config))
    kept = interrupted(config, monkeypatch)
    assert len(kept) > 5
    match damage:
        case "cut":
            os.truncate(kept[2], kept[2].stat().st_size - 100)
        case "flipped":
            data = bytearray(kept[2].read_bytes())
            data[300] ^= 1
            kept[2].write_bytes(data)
        case "gone":
            kept[0].unlink()
        case "other":
            kept[1].write_bytes(b"not an archive")
    prepare(config)
    assert digests(config) == digests(elsewhere(config))


def test_a_source_that_gives_other_text_is_refused_once(config, monkeypatch):
    kept = interrupted(config, monkeypatch)
    other = [shards.Measured("a", "other", 5, False)] * 300
    with monkeypatch.context() as patch:
        patch.setattr(cache._Cache, "_measured", lambda *_: iter(other))
        with pytest.raises(UserError, match="the source gives other documents than before"):
            prepare(config)
    assert not kept[0].exists()
    prepare(config)


def test_one_shard_is_not_kept(config, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 10**9)
    assert not interrupted(config, monkeypatch)
