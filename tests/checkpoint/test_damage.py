"""Damaged checkpoints and full disks: never a wrong resume, and never a lost run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.helpers import Heard, losses, quicker, tiny_recipe, write_recipe
from trainfw import RunError, UserError, build_program, load_model, train
from trainfw.checkpoint import Checkpoints
from trainfw.training import RunDirectory
from trainfw.weights import open_base


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(directory)
    train(recipe, devices=jax.devices()[:1], run_dir=directory / "run", reporter=Heard())
    return recipe, directory / "run"


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Change one file in one of the ways in which files change."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "truncated", "emptied", "zeroed", "gone", "longer"])
    match kind:
        case "bit":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "truncated":
            del content[rng.randrange(len(content)) :]
        case "emptied":
            content.clear()
        case "zeroed":
            start = rng.randrange(len(content))
            content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        case "longer":
            content += rng.randbytes(rng.randrange(1, 100))
    path.unlink() if kind == "gone" else path.write_bytes(content)
    return f"{path.relative_to(checkpoint)} {kind}"


@pytest.mark.parametrize("count", quicker([40, 200], [40]))
def test_corruptions(finished, tmp_path, count):
    """Each is either seen, or changes nothing that a restore reads."""
    recipe, run = finished
    rng = random.Random(0)
    state = build_program(recipe, jax.devices()[:1]).abstract_state
    rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}

    def restored(checkpoints, step):
        params, others, meta = checkpoints.restore(step, state.params, rest)
        return [x.tobytes() for x in map(jax.device_get, jax.tree.leaves((params, others)))], meta

    def opened(directory):
        return contextlib.closing(Checkpoints(directory, recipe.checkpoint))

    with opened(run / "checkpoints") as checkpoints:
        right = {step: restored(checkpoints, step) for step in (4, 8)}
    seen = 0
    for number in range(count):
        directory = copied(run / "checkpoints", tmp_path / str(number) / "checkpoints")
        what = damage(directory / "8", rng)
        said: list[str] = []
        with opened(directory) as checkpoints:
            step = checkpoints.newest_whole(said.append)
            if step == 8:
                with contextlib.suppress(RunError):  # a clear error is as good
                    assert restored(checkpoints, 8) == right[8], what
            else:
                seen += 1
                assert step == 4, what
                assert "the checkpoint of step 8 is damaged" in said[0]
                assert number % 20 or restored(checkpoints, 4) == right[4]
        shutil.rmtree(tmp_path / str(number))
    assert seen > 0.75 * count


def test_training_goes_on_from_the_one_before(finished, tmp_path):
    recipe, run = finished
    expected, run = losses(run), copied(run, tmp_path / "run")
    target = next(path for path in (run / "checkpoints" / "8" / "params").rglob("*") if path.stat().st_size > 4096)
    content = bytearray(target.read_bytes())
    content[3000] ^= 1
    target.write_bytes(content)
    with pytest.raises(RunError, match=r"step 8 is damaged: params/.* differs\); step 4 is whole"):
        load_model(run)
    heard = Heard()
    train(recipe, devices=jax.devices()[:1], run_dir=run, reporter=heard)
    assert any("the checkpoint of step 8 is damaged: params/" in note for note in heard.notes)
    assert any("going back to step 4" in note for note in heard.notes)
    assert losses(run) == expected
    assert (run / "damaged" / "8").is_dir()  # kept, for whoever wants to look


def test_no_whole_checkpoint_is_a_clear_error(finished, tmp_path):
    recipe, run = finished
    run = copied(run, tmp_path / "run")
    for step in (4, 8):
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="no checkpoint is whole"):
        train(recipe, devices=jax.devices()[:1], run_dir=run, reporter=Heard())
    assert (run / "metrics.jsonl").read_bytes() == before


def consistent(checkpoint: Path, change) -> None:
    """Change `meta`, and the manifest with it, as nobody does by accident."""
    file, manifest = checkpoint / "meta" / "metadata", checkpoint / "manifest.json"
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))
    listed = json.loads(manifest.read_text())
    listed["sha256"]["meta/metadata"] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    manifest.write_text(json.dumps(listed))


def set_lr(meta):
    meta["recipe"]["optimizer"]["learning_rate"] = 1.0


NOT_THIS_RUNS = {
    "another step's": (
        lambda at, other: (shutil.rmtree(at / "8"), shutil.copytree(at / "4", at / "8")),
        "it is step 4, not 8",
    ),
    "a step that is to come": (lambda at, other: (at / "8").rename(at / "9"), "it is step 8, not 9"),
    "another run's": (
        lambda at, other: (shutil.rmtree(at / "8"), shutil.copytree(other / "8", at / "8")),
        "it is of another run (",
    ),
    "another recipe's": (
        lambda at, other: consistent(at / "8", set_lr),
        "the recipe in meta/metadata is not the one that manifest.json names",
    ),
    "null steps": (
        lambda at, other: consistent(at / "8", lambda meta: meta["data"].update(next_row=None)),
        "meta/metadata: data.next_row: input should be a valid integer",
    ),
    "missing keys": (
        lambda at, other: consistent(at / "8", lambda meta: meta.pop("data")),
        "meta/metadata has no data",
    ),
    "of no run": (
        lambda at, other: (at / "8" / "manifest.json").write_text(
            json.dumps({"sha256": json.loads((at / "8" / "manifest.json").read_text())["sha256"]})
        ),
        "it does not say of which run it is",
    ),
}


@pytest.fixture(scope="module")
def another(finished, tmp_path_factory):
    """The checkpoints of a run of the same shape."""
    recipe, _ = finished
    directory = tmp_path_factory.mktemp("another")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    train(recipe, devices=jax.devices()[:1], run_dir=directory / "run", reporter=Heard())
    return directory / "run" / "checkpoints"


@pytest.mark.parametrize("kind", NOT_THIS_RUNS)
def test_what_is_not_this_runs_is_not_taken(finished, another, tmp_path, kind):
    recipe, run = finished
    run = copied(run, tmp_path / "run")
    put, said = NOT_THIS_RUNS[kind]
    put(run / "checkpoints", another)
    last = RunDirectory(run).steps()[-1]
    if kind == "another run's":
        with pytest.raises(
            RunError, match=rf"the checkpoint of step {last} is damaged: {re.escape(said)}.*; step 4 is whole"
        ):
            load_model(run)
    with pytest.raises(RunError, match=re.escape(said)):
        open_base(str(run))
    heard: list[str] = []
    identity = RunDirectory(run).identity()
    with contextlib.closing(Checkpoints(run / "checkpoints", recipe.checkpoint, identity=identity)) as checkpoints:
        assert checkpoints.newest_whole(heard.append) == 4
    assert f"warning: the checkpoint of step {last} is damaged: {said}" in heard[0]
    assert heard[0].endswith("going back to step 4")


def test_goes_on_beside_another_runs_and_an_empty_directory(finished, another, tmp_path):
    recipe, run = finished
    expected, run = losses(run), copied(run, tmp_path / "run")  # a copy is the run itself
    NOT_THIS_RUNS["another run's"][0](run / "checkpoints", another)
    (run / "checkpoints" / "20").mkdir()
    heard = Heard()
    train(recipe, devices=jax.devices()[:1], run_dir=run, reporter=heard)
    assert losses(run) == expected
    assert RunDirectory(run).steps() == [4, 8]
    assert any("checkpoints/20 is no checkpoint; moved to" in note for note in heard.notes)


def test_a_checkpoint_that_may_not_be_read_is_no_stranger(finished, tmp_path, monkeypatch):
    recipe, run = finished
    run = copied(run, tmp_path / "run")
    access = os.access  # root may read all
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(run / "checkpoints/8") and access(path, mode))
    with pytest.raises(UserError, match=r"checkpoints/8: cannot be read: Permission denied"):
        train(recipe, devices=jax.devices()[:1], run_dir=run, reporter=Heard())
    assert (run / "checkpoints/8/manifest.json").is_file()


def test_an_id_that_is_lost_is_found_in_the_checkpoints(finished, tmp_path):
    run = copied(finished[1], tmp_path / "run")
    identity = RunDirectory(run).identity()
    for content in (None, "", "{", "[]", '{"format": 2, "run": null}'):
        (run / "run.json").unlink() if content is None else (run / "run.json").write_text(content)
        said: list[str] = []
        assert RunDirectory(run).identity(said.append) == identity
        assert bool(said) == (content is not None)
        if content is not None:
            with pytest.raises(RunError, match=r"run\.json: cannot be read; remove it"):
                load_model(run)


needs_tmpfs = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a small tmpfs, as root"
)


@pytest.fixture
def small_disk(tmp_path):
    """8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk):
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
        while True:
            file.write(bytes(65536))


@needs_tmpfs
def test_a_full_disk_fails_the_save_and_not_the_run(tmp_path, small_disk):
    """Full for a while, then not: the run ends well, and its losses are those of one that never saw it."""
    recipe = tiny_recipe(tmp_path, "train.steps=12", "checkpoint={every: 2, max_failures: 10}")
    straight = tmp_path / "straight"
    train(recipe, devices=jax.devices()[:1], run_dir=straight, reporter=Heard())

    class Filling(Heard):
        def row(self, row, steps):
            if row["step"] == 3:
                fill(small_disk)
            if row["step"] == 9:
                (small_disk / "filler").unlink()

    heard = Filling()
    train(recipe, devices=jax.devices()[:1], run_dir=small_disk / "run", reporter=heard)
    failed = [note for note in heard.notes if "cannot be saved" in note]
    assert failed
    assert "the run goes on (1 of at most 10 failures in a row)" in failed[0]
    assert RunDirectory(small_disk / "run").steps()[-1] == 12
    kept = losses(small_disk / "run")
    assert kept == {step: loss for step, loss in losses(straight).items() if step in kept}
    assert not list((small_disk / "run" / "checkpoints").glob("*tmp*"))  # what was half written takes no room


@needs_tmpfs
@pytest.mark.long
def test_the_last_save_is_tried_twice(tmp_path, small_disk):
    class Filling(Heard):
        def row(self, row, steps):
            if row["step"] == 6:
                fill(small_disk)

        def note(self, text):
            super().note(text)
            if "trying once more" in text:
                (small_disk / "filler").unlink()

    heard = Filling()
    recipe = tiny_recipe(tmp_path, "train.steps=6", "checkpoint.every=0")
    train(recipe, devices=jax.devices()[:1], run_dir=small_disk / "run", reporter=heard)
    assert any("step 6" in note and note.endswith("trying once more") for note in heard.notes)
    assert RunDirectory(small_disk / "run").steps() == [6]


@needs_tmpfs
@pytest.mark.long
def test_a_disk_that_stays_full_ends_the_run(tmp_path, small_disk):
    write_recipe(tmp_path)
    recipe = tiny_recipe(tmp_path, "train.steps=40", "checkpoint={every: 4, max_failures: 2, keep_last: 1}")

    class Filling(Heard):
        def row(self, row, steps):
            if row["step"] == 9:  # the save of step 4 was waited for
                fill(small_disk)

    with pytest.raises(RunError, match=r"step \d+ cannot be saved: .*"):
        train(recipe, devices=jax.devices()[:1], run_dir=small_disk / "run", reporter=Filling())
    # The last good one is not deleted for one that failed.
    assert RunDirectory(small_disk / "run").steps() in ([4], [8])
    load_model(small_disk / "run")
