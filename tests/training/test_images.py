"""A run of a model of images: it learns, goes on bit for bit, draws, and is evaluated."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers import Heard, losses
from trainfw import UserError, load_drawer, load_recipe, train
from trainfw.cli.generate import generate as pictures
from trainfw.training import evaluate, tiny_overrides
from trainfw.training.run_directory import RunDirectory

CLASSES = {"conditioning": "class", "num_classes": 10}
CAPTIONS = {"conditioning": "cross", "caption_length": 3, "caption_size": 8, "text_encoder": "hashed-words"}


def recipe_of(directory, model=CLASSES, *overrides):
    tree = {
        "name": "pictures",
        "model": {
            "family": "dit",
            "image_size": 8,
            "channels": 1,
            "patch_size": 2,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            **model,
        },
        "data": {"format": "images", "source": "digits", "cache_dir": str(directory / "cache")},
        "objective": {"name": "flow_matching"},
        "optimizer": {"learning_rate": 3.0e-3, "schedule": "constant", "ema": 0.9},
        "train": {"steps": 6, "global_batch_size": 8, "log_every": 1, "sample_images": 4, "validation_batches": 1},
        "checkpoint": {"every": 3},
    }
    return load_recipe(tree, overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def run(place):
    heard = Heard()
    recipe = recipe_of(place, CLASSES, "evaluation={metric: class_accuracy, examples: 20}")
    result = train(recipe, devices=jax.devices()[:1], run_dir=place / "whole", reporter=heard)
    return result, heard.notes


def test_a_run_learns_evaluates_and_goes_on_bit_for_bit(place, run):
    result, notes = run
    first, last = (row for row in RunDirectory(result.run_dir).metrics() if "validation_loss" in row)
    assert last["validation_loss"] < first["validation_loss"]
    assert any("class_accuracy" in note and "before training" in note for note in notes)
    for steps in (3, 6):
        again = train(
            recipe_of(place, CLASSES, f"train.steps={steps}"), devices=jax.devices()[:1], run_dir=place / "again"
        )
    assert losses(result.run_dir) == losses(again.run_dir)
    assert result.validation == again.validation
    assert sum("nearest training picture" in note and note.startswith("sample '") for note in notes) == 3
    images = {file.name: Image.open(file).size for file in (result.run_dir / "samples").iterdir()}
    drawn = dict.fromkeys(("step-000000.png", "step-000006.png"), (65, 65))
    assert images == {"nearest-000006.png": (98, 65)} | drawn


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(place, run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(place, CLASSES, "train={steps: 60}", "checkpoint.every=7").to_yaml())
    for name, kills in (("whole", ()), ("killed", (20, 40))):
        for kill_at in (*kills, None):
            command = [sys.executable, "-m", "trainfw", "train", str(recipe), "--run-dir", str(tmp_path / name)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            metrics = tmp_path / name / "metrics.jsonl"
            while kill_at is not None and process.poll() is None:
                if metrics.exists() and f'"step": {kill_at},' in metrics.read_text():
                    process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.05)
            assert process.wait() == (0 if kill_at is None else -signal.SIGKILL)
    rows = [
        [row for row in RunDirectory(tmp_path / name).metrics() if "validation_loss" in row]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]  # by the average of the weights
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_pictures_are_drawn_alike_whatever_is_drawn_beside_them(run):
    result, _ = run
    drawer = load_drawer(result.run_dir, count=8)
    assert drawer.usual_guidance == 4  # a tenth of the classes were left out, as nothing was said
    several = drawer.draw(["7", "0", "7"], steps=3, seed=5)
    assert several.shape == (3, 8, 8, 1)
    assert np.array_equal(several[0], drawer.draw(["7"], steps=3, seed=5)[0])
    assert not np.array_equal(several[0], several[2])  # other noise
    with pytest.raises(UserError, match="is no class of the model; expected one of 0, 1, 2"):
        drawer.draw(["x"])
    for wrong in ({"prompts": "7"}, {"prompts": []}, {"guidance": float("nan")}, {"sampler": 3}):
        with pytest.raises(UserError, match=r"^(prompts|guidance|sampler) = "):
            drawer.draw(**{"prompts": ["7"], **wrong})
    with pytest.raises(UserError, match=r"sampler = 'eular'.*did you mean 'euler'"):
        drawer.draw(["1"], sampler="eular")


def test_generate_writes_a_grid_and_refuses_what_does_not_apply(run, tmp_path, capsys):
    result, _ = run
    out = tmp_path / "seven.png"

    def generate(**options):
        return pictures(str(result.run_dir), prompt=["7"], out=str(out), steps=2, **options)

    generate(count=4, scale=2)
    assert Image.open(out).size == (33, 33)
    assert "4 pictures in" in capsys.readouterr().out
    for more, problem in (({}, "exists already"), ({"temperature": 1.0}, "does not apply")):
        with pytest.raises(UserError, match=problem):
            generate(**more)


def test_a_run_is_evaluated_again(run):
    result, _ = run
    validation, data = evaluate(result.run_dir)
    assert validation.loss == pytest.approx(result.validation.loss, rel=1e-5)
    assert validation.unit == "image"
    assert data.classes == tuple("0123456789")


def test_captions_condition_a_model(place):
    heard = Heard()
    recipe = recipe_of(place, CAPTIONS, "evaluation={metric: retrieval, examples: 8, samples: 2}")
    result = train(recipe, devices=jax.devices()[:1], run_dir=place / "captions", reporter=heard)
    assert any(re.search(r"own among the 10 nearest of \d+ held-out ones; 0\.\d+ by chance", n) for n in heard.notes)
    drawer = load_drawer(result.run_dir, count=8)
    assert drawer.draw(["seven", "one"], steps=2).shape == (2, 8, 8, 1)
    with pytest.warns(UserWarning, match="1 prompt longer than the 3 tokens"):
        drawer.draw(["one two three four"], steps=1)


def test_a_model_learns_and_draws_latents_of_an_autoencoder(place):
    shape = {"family": "autoencoder", "image_size": 8, "channels": 1, "latent_channels": 2, "block_channels": [8, 8]}
    tree = {
        "model": {**shape, "norm_groups": 4, "layers_per_block": 1},
        "data": {"format": "images", "source": "digits", "cache_dir": str(place / "cache")},
        "objective": {"name": "reconstruction"},
        "train": {"steps": 2, "global_batch_size": 8, "validation_batches": 1},
    }
    encoder = train(load_recipe(tree), devices=jax.devices()[:1], run_dir=place / "encoder")
    assert encoder.validation.unit == "image"
    assert not (encoder.run_dir / "samples").exists()
    latents = {"image_size": 4, "channels": 2, "autoencoder": str(encoder.run_dir)}
    recipe = recipe_of(place, latents, "objective.drop_condition=0")
    result = train(recipe, devices=jax.devices()[:1], run_dir=place / "latents")
    drawer = load_drawer(result.run_dir, count=8)
    assert drawer.draw([None] * 2, steps=2).shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match="guidance = 7: expected 1: the model has no condition"):
        drawer.draw([None], guidance=7)
    with pytest.raises(UserError, match="makes latents of 2 channels"):
        train(recipe_of(place, {**latents, "channels": 3}), devices=jax.devices()[:1], run_dir=place / "other")
    train(load_recipe(tree, ["train.steps=3"]), devices=jax.devices()[:1], run_dir=encoder.run_dir)
    for use in (
        lambda: load_drawer(result.run_dir, count=8).draw([None]),
        lambda: evaluate(result.run_dir),
        lambda: train(load_recipe(recipe, ["train.steps=7"]), devices=jax.devices()[:1], run_dir=result.run_dir),
    ):
        with pytest.raises(UserError, match=r"model\.autoencoder = .*has other weights"):
            use()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("data.format=text", "data.format"),
        ("objective.name=next_token", "objective.name"),
        ("evaluation={metric: rouge_l}", "evaluation.metric"),
        ("train.sample_prompt=a", "train.sample_prompt"),
        ("evaluation={metric: retrieval}", "evaluation.metric"),
        ("train.z_loss=0.1", "train.z_loss"),
        ("model.num_classes=9", "model.num_classes"),
        ("model.image_size=9", "model.image_size"),
    ],
)
def test_sections_that_do_not_go_together_are_refused(place, tmp_path, changed, problem):
    with pytest.raises(UserError, match=problem.replace(".", r"\.")):
        train(recipe_of(place, CLASSES, changed), devices=jax.devices()[:1], run_dir=tmp_path / "run")


def test_a_tiny_run_of_every_axis(place, tmp_path):
    recipe = recipe_of(place, CLASSES, "parallel={data: 1, fsdp: 2, context: 2, tensor: 2}")
    tiny = load_recipe(recipe, tiny_overrides(recipe, 8))
    assert train(tiny, run_dir=tmp_path / "run").step == 5
