"""Runs whose text is streamed: they go on bit for bit, and lose nothing where a store does not answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import fsspec
import jax
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.helpers import Heard, losses, tiny_recipe
from trainfw import RunError, UserError
from trainfw.data import remote, streaming
from trainfw.recipe import Recipe
from trainfw.training import evaluate, train
from trainfw.training.session import Interrupted


class Store:
    """The texts of `tiny_recipe` in memory, which may be away."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files, self.away, self.asked = fsspec.filesystem("memory"), False, 0
        self.files.store.clear()
        for path in sorted((directory / "text").iterdir()):
            self.files.pipe(f"/texts/{path.name}", path.read_bytes())
        whole = MemoryFileSystem.cat_file

        def cat_file(files: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
            if self.away:
                self.asked += 1
                self.told()
                raise ConnectionError("no route to host")
            return whole(files, path, start, end)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
        monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
        monkeypatch.setattr(streaming, "_POLL_SECONDS", 0.05)
        monkeypatch.setattr(streaming, "BATCH_BYTES", 300)

    def told(self) -> None:
        """Nothing, unless a test says so."""


def recipe_of(directory: Path, steps: int, wait: float = 0.3) -> Recipe:
    stream = f"data.stream={{window: 8, cache_bytes: 0, wait_seconds: {wait}}}"
    settings = ("optimizer.schedule=constant", "checkpoint.every=0", f"data.cache_dir={directory / 'cache'}")
    return tiny_recipe(directory, f"train.steps={steps}", stream, "data.source=memory://texts/", *settings)


def run(recipe: Recipe, directory: Path, heard: Heard | None = None) -> None:
    train(recipe, devices=jax.devices()[:1], run_dir=directory, reporter=heard or Heard())


def test_a_store_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_of(tmp_path, 1)  # which writes the texts
    store = Store(tmp_path, monkeypatch)
    run(recipe_of(tmp_path, 40), tmp_path / "straight")
    expected = losses(tmp_path / "straight")

    def leave_after(step: int) -> Heard:
        class Leaving(Heard):
            def step(self, number: int, steps: int) -> None:
                store.away = store.away or number >= step

        return Leaving()

    # It stays away: the steps go on with what was read, the run fails, and is saved at its last step.
    with pytest.raises(RunError, match=r"data: .*|memory:///texts/.*: cannot be read, tried for .*: ConnectionError"):
        run(recipe_of(tmp_path, 40), tmp_path / "run", heard := leave_after(3))
    assert any("no answer (ConnectionError: no route to host); trying again for 0.3 s" in note for note in heard.notes)
    done = max(losses(tmp_path / "run"))
    assert 3 <= done < 40
    # A signal while it is waited for: saved, and left at once.
    store.told = lambda: os.kill(os.getpid(), signal.SIGTERM) if store.asked > 5 else None
    store.away, store.asked = False, 0
    with pytest.raises(Interrupted):
        run(recipe_of(tmp_path, 40, wait=600), tmp_path / "run", leave_after(done + 1))
    store.away = False
    run(recipe_of(tmp_path, 40), tmp_path / "run")
    assert losses(tmp_path / "run") == expected

    assert evaluate(tmp_path / "run")[0].loss > 0
    store.files.pipe("/texts/3.txt", b"another text")
    with pytest.raises(UserError, match="the data has changed since this state was saved"):
        run(recipe_of(tmp_path, 44), tmp_path / "run")
