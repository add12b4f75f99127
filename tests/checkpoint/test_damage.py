"""Damaged checkpoints and full disks: never a wrong resume, and never a lost run."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.helpers import Heard, losses, tiny_recipe, write_recipe
from trainfw import RunError, build_program, load_model, train
from trainfw.checkpoint import Checkpoints
from trainfw.training import RunDirectory


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


def test_two_hundred_corruptions(finished, tmp_path):
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
    for number in range(200):
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
    assert seen > 150


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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
