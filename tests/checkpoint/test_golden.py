"""Run directories as released versions wrote them: they open, go on, and come to the losses that they came to then.

To add one: see CONTRIBUTING.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import pytest

from tests.helpers import Heard, losses
from trainfw import RunError, UserError, evaluate, load_recipe, train
from trainfw.checkpoint import FORMAT, read_identity, write_identity
from trainfw.training import RunDirectory

GOLDEN = sorted((Path(__file__).parent / "golden").glob("format-*.tar.xz"))


@pytest.fixture
def unpacked(request, tmp_path, monkeypatch):
    """A run directory that was trained to step 8 and kept the checkpoint of step 4, beside its data."""
    shutil.unpack_archive(request.param, tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("unpacked", GOLDEN, indirect=True, ids=lambda path: path.name.partition(".")[0])
def test_goes_on_and_comes_to_the_same_losses(unpacked):
    recorded, recipe = losses(unpacked), load_recipe(unpacked / "recipe.yaml")
    evaluate(unpacked)  # before anything is written
    heard = Heard()
    train(recipe, devices=jax.devices()[:1], run_dir=unpacked, resume="must", reporter=heard)
    assert any(note.startswith("resumed") and "at step 4" in note for note in heard.notes)
    assert losses(unpacked) == pytest.approx(recorded, rel=1e-5)
    identity = read_identity(unpacked)
    manifests = {step: json.loads((unpacked / f"checkpoints/{step}/manifest.json").read_text()) for step in (4, 8)}
    assert manifests[8]["run"] == identity.run
    assert ("4" in identity.older) == ("run" not in manifests[4])
    assert RunDirectory(unpacked).identity() == identity


@pytest.mark.parametrize("unpacked", GOLDEN, indirect=True, ids=lambda path: path.name.partition(".")[0])
def test_under_another_steps_name_it_is_refused(unpacked):
    (unpacked / "checkpoints/4").rename(unpacked / "checkpoints/6")
    with pytest.raises(RunError, match=r"step 6\b.* is step 4, not 6"):
        train(load_recipe(unpacked / "recipe.yaml"), devices=jax.devices()[:1], run_dir=unpacked, reporter=Heard())


def test_every_format_is_kept():
    assert [path.name for path in GOLDEN] == [f"format-{number}.tar.xz" for number in range(1, FORMAT + 1)]


@pytest.mark.parametrize("unpacked", GOLDEN[-1:], indirect=True)
def test_of_a_newer_version_is_refused(unpacked):
    recipe = load_recipe(unpacked / "recipe.yaml")
    newer = {"format": FORMAT + 1, "trainfw": "9.1.0"}
    said = (
        rf"run: was written by trainfw 9\.1\.0 \(format {FORMAT + 1}\); this is trainfw .* up to {FORMAT}: upgrade it"
    )
    manifest, run = unpacked / "checkpoints/4/manifest.json", unpacked / "run.json"
    for file in (run, manifest):
        before = file.read_bytes()
        file.write_text(json.dumps(json.loads(before) | newer))
        for use in (
            lambda: evaluate(unpacked),
            lambda: train(recipe, devices=jax.devices()[:1], run_dir=unpacked, reporter=Heard()),
        ):
            with pytest.raises(UserError, match=said if file == run else said.replace("run:", "4:")):
                use()
        file.write_bytes(before)
    assert (unpacked / "checkpoints/4").is_dir()  # it is not taken for damaged


def test_an_identity_is_kept(tmp_path):
    run = RunDirectory(tmp_path)
    identity = run.identity()
    write_identity(tmp_path, identity)
    assert read_identity(tmp_path) == run.identity() == identity


def test_a_pipe_in_the_place_of_run_json_is_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(RunError, match="cannot be read; remove it"):
        read_identity(tmp_path)


def test_a_run_json_without_end_is_not_read(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RunError, match=r"run\.json: cannot be read \(it has more than 16,777,216 bytes\); remove it"):
        read_identity(tmp_path)
