"""The cache of compiled programs: on by default, off on request, and never in the way of a run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import COMPILED_QUICKLY, write_recipe
from trainfw.backends.compiled import Executables

PROGRAM = """
import json, sys
import trainfw
from trainfw import backends
if "prepare" in sys.argv:
    backends.prepare(int(sys.argv[4]))
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
recipe = trainfw.load_recipe(sys.argv[1], ["train.steps=3", *sys.argv[5:]])
result = trainfw.train(recipe, run_dir=sys.argv[2])
print(json.dumps({"hits": len(hits), "directory": jax.config.jax_compilation_cache_dir}))
"""
UNSET = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


class Runs:
    """Runs of one recipe, each in a process of its own, with one cache."""

    def __init__(self, directory: Path):
        self.directory, self.cache = directory, directory / "cache" / "trainfw" / "compiled"
        self.recipe = write_recipe(directory)
        self.count = 0

    def run(self, *arguments: str, **environment: str) -> tuple[dict, list[dict]]:
        """What it says of the cache, and its metrics but for times."""
        self.count += 1
        run = self.directory / f"run-{self.count}"
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(self.recipe), str(run), *arguments],
            env=kept
            | {
                "XDG_CACHE_HOME": str(self.directory / "cache"),
                "XLA_FLAGS": COMPILED_QUICKLY,
                "JAX_PLATFORMS": "cpu",
                **environment,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = ("step_time_seconds", "tokens_per_second", "goodput", "mfu")
        return json.loads(done.stdout.splitlines()[-1]), [
            {name: value for name, value in row.items() if name not in timed} for row in rows
        ]

    def entries(self) -> list[Path]:
        return sorted(self.cache.glob("*.executable"))


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)


def test_what_was_compiled_computes_the_same_bits(runs):
    said, first = runs.run()  # by train() alone
    assert said == {"hits": 0, "directory": str(runs.cache)}
    assert stat.S_IMODE(runs.cache.stat().st_mode) == 0o700
    kept = len(runs.entries())  # on a busy machine another run may keep one that compiled too quickly in this
    said, second = runs.run("prepare", "1")
    assert said["hits"] == kept >= 3
    assert first == second

    whole = {entry: entry.read_bytes() for entry in runs.entries()}
    for number, (entry, data) in enumerate(whole.items()):  # cut short, emptied, or one bit of it another
        entry.write_bytes((data[: len(data) // 2], b"", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])[number % 3])
    said, after = runs.run()
    assert said["hits"] == 0
    assert after == first
    assert set(runs.entries()) >= set(whole)
    store = Executables(runs.cache)
    assert all(store.get(entry.stem) for entry in whole)  # written anew


@pytest.mark.long
def test_so_does_a_step_of_several_devices(runs):
    """Of any size: this one's buffers are larger than a block of glibc's."""
    large = ("prepare", "2", "train.steps=1", "train.global_batch_size=128", "model.intermediate_size=4096")
    said, first = runs.run(*large)
    assert said["hits"] == 0
    steps = [entry for entry in runs.entries() if "train_step" in entry.name]
    assert len(steps) == 1
    kept = len(runs.entries())
    said, second = runs.run(*large)
    assert said["hits"] == kept
    assert first == second


@pytest.mark.long
def test_jax_settings_come_first_and_an_unwritable_cache_is_none(runs):
    own = runs.directory / "own"
    said, first = runs.run(JAX_COMPILATION_CACHE_DIR=str(own))
    assert said["directory"] == str(own)
    assert list(own.glob("*-cache"))
    assert not runs.cache.exists()
    runs.cache.parent.mkdir(parents=True, exist_ok=True)
    runs.cache.write_text("a file")
    said, _ = runs.run()
    assert said == {"hits": 0, "directory": None}
    said, without = runs.run(JAX_ENABLE_COMPILATION_CACHE="false")
    assert said == {"hits": 0, "directory": None}
    assert without == first


def test_entries(tmp_path):
    store = Executables(tmp_path / "new")
    assert store.get("a") is None
    store.put("a", b"first")
    store.put("a", b"second")
    assert store.get("a") == b"second"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.executable"]


def test_what_was_not_used_for_longest_goes(tmp_path):
    store = Executables(tmp_path, most_bytes=3 * (16 + 100))
    for number, key in enumerate("abc"):
        store.put(key, bytes(100))
        os.utime(tmp_path / f"{key}.executable", (number, number))
    assert store.get("a") is not None  # used, hence not the oldest
    store.put("d", bytes(100))
    assert [key for key in "abcd" if store.get(key) is not None] == ["a", "c", "d"]


def test_a_full_disk_is_no_matter(tmp_path, monkeypatch):
    store = Executables(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    store.put("a", b"value")
    assert store.get("a") is None
    assert not list(tmp_path.iterdir())
