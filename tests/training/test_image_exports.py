"""Runs of models of images beside diffusers: what they export draws the same there, and adapters of them learn."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.helpers import losses
from tests.interop.diffusers.autoencoders import make
from tests.training.test_images import recipe_of
from trainfw import UserError, build_program, load_drawer, load_recipe, sampling, train
from trainfw.cli.generate import generate as pictures
from trainfw.interop import open_autoencoder, open_transformer, read_lora
from trainfw.objectives import normal_rows
from trainfw.weights import export_model, merge_adapter, named, read_adapter

STEPS, ROWS, SHAPE = 5, 8, (8, 8, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def base(place):
    """A run of a model of classes, and the directory that it is exported to."""
    quiet = ("train.sample_images=0", "train.validation_batches=0", "train.steps=3", "optimizer.learning_rate=0.03")
    recipe = recipe_of(place, {"conditioning": "class", "num_classes": 10}, *quiet, "objective.shift=2.0")
    result = train(recipe, devices=jax.devices()[:1], run_dir=place / "base")
    said = export_model(str(result.run_dir), str(place / "out"))
    assert "transformer and scheduler of diffusers" in said
    assert "the average of the weights" in said
    return result.run_dir, place / "out"


def noise():
    return normal_rows(3, np.arange(ROWS), SHAPE, 0)


LABELS = np.arange(ROWS, dtype=np.int32)


def ours(run, **options):
    """Pictures of a run, not rounded."""
    drawer = load_drawer(run, count=ROWS, **options)
    predict = drawer._predict({"label": LABELS}, 1.0)
    start = jax.device_put(noise(), drawer._places["image"].sharding)
    schedule = drawer.program.objective.schedule
    return np.asarray(sampling.draw(predict, start, schedule=schedule, sampler="euler", steps=STEPS))


def theirs(directory):
    """The same by diffusers, from what it reads in a directory."""
    model = DiTTransformer2DModel.from_pretrained(directory / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")
    scheduler.set_timesteps(STEPS)
    x = torch.tensor(noise().transpose(0, 3, 1, 2))
    with torch.no_grad():
        for time in scheduler.timesteps:
            prediction = model(x, timestep=time.expand(ROWS), class_labels=torch.tensor(LABELS)).sample
            x = scheduler.step(prediction, time, x).prev_sample
    return x.numpy().transpose(0, 2, 3, 1)


def test_an_exported_run_draws_the_same_in_diffusers(place, base):
    run, out = base
    expected = theirs(out)
    np.testing.assert_allclose(ours(run), expected, atol=1e-4)
    export_model(str(run), str(place / "raw"), weights="raw", format="diffusers")
    raw = theirs(place / "raw")
    np.testing.assert_allclose(ours(run, weights="raw"), raw, atol=1e-4)
    assert np.abs(raw - expected).max() > 1e-3
    for kind in ("gguf", "hf", "peft", "gguf-lora"):
        with pytest.raises(UserError, match=f"format '{kind}'.*is for models of text.*images: diffusers is for these"):
            export_model(str(run), str(place / "no"), format=kind)


def test_a_model_starts_from_a_directory_of_diffusers(place, base):
    run, out = base
    read = open_transformer(out / "transformer")
    for source in (out, out / "transformer", run):
        tree = yaml.safe_load((run / "recipe.yaml").read_text()) | {"model": {"from": str(source)}}
        recipe = load_recipe(tree)
        assert recipe.model.family == "dit"
        assert recipe.model.model_copy(update={"from_": None}) == read.config
    assert recipe.model.from_ == str(run)
    recipe = load_recipe(tree, {"model": {"from": str(out)}})
    assert recipe.model.from_ == str(out / "transformer")
    state = build_program(recipe, jax.devices()[:1]).init()
    for name, value in named(state.params):
        np.testing.assert_array_equal(value, read.array(name))
    with pytest.raises(UserError, match="is a pipeline of diffusers; give the directory of one of its models"):
        load_recipe(tree, {"model": {"from": str(out), "family": "decoder"}})


def test_an_autoencoder_is_found_in_a_pipeline_and_written_again(place):
    make("greys", sample_size=8).save_pretrained(place / "pipeline" / "vae")
    tree = yaml.safe_load(recipe_of(place).to_yaml()) | {
        "model": {"family": "autoencoder", "from": str(place / "pipeline")},
        "objective": {"name": "reconstruction"},
        "train": {"steps": 1, "global_batch_size": 8, "validation_batches": 0},
    }
    recipe = load_recipe(tree, ["optimizer.ema=null", "optimizer.learning_rate=1e-30"])
    source = open_autoencoder(place / "pipeline" / "vae")
    assert recipe.model.model_copy(update={"from_": None}) == source.config
    run = train(recipe, devices=jax.devices()[:1], run_dir=place / "vae").run_dir
    assert "vae of diffusers" in export_model(str(run), str(place / "written"))
    back = open_autoencoder(place / "written" / "vae")
    for path in source.names:
        np.testing.assert_array_equal(back.array(path), source.array(path))


def adapter_recipe(place, out, *overrides, **adapter):
    tree = yaml.safe_load(recipe_of(place).to_yaml())
    tree |= {"model": {"from": str(out)}, "adapter": {"rank": 2, "alpha": 4.0} | adapter}
    tree["train"] |= {"steps": 4, "sample_images": 0, "validation_batches": 0}
    tree["checkpoint"] = {"every": 2}
    tree["optimizer"] |= {"ema": None, "learning_rate": 0.03}
    tree["objective"]["shift"] = 2.0  # as of the base, by whose schedule pictures are drawn
    return load_recipe(tree, overrides)


def test_an_adapter_learns_alike_on_meshes_goes_on_and_is_exported(place, base):
    _, out = base
    one = train(adapter_recipe(place, out), devices=jax.devices()[:1], run_dir=place / "one").run_dir
    sharded = adapter_recipe(place, out, "parallel={fsdp: 2, tensor: 2}")
    for steps in (2, 4):
        run = train(
            load_recipe(sharded, [f"train.steps={steps}"]), devices=jax.devices()[:4], run_dir=place / "mesh"
        ).run_dir
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    whole = train(sharded, devices=jax.devices()[:4], run_dir=place / "whole").run_dir
    assert losses(run) == losses(whole)
    said = export_model(str(one), str(place / "lora"))
    assert "lora of diffusers" in said
    assert "DiTTransformer2DModel has no load_lora_adapter" in said
    trained = read_adapter(str(one), open_transformer(out / "transformer").config)
    _, arrays = read_lora(place / "lora", open_transformer(out / "transformer").config)
    assert set(arrays) == set(trained.arrays)
    assert max(float(np.abs(arrays[name]).max()) for name in arrays if name.endswith("lora_b")) > 0
    for name, value in trained.arrays.items():
        np.testing.assert_array_equal(arrays[name], value)
    merge_adapter(str(one), str(place / "merged"))
    merge_adapter(str(place / "lora"), str(place / "merged2"), base=str(out))
    np.testing.assert_allclose(ours(one), theirs(place / "merged"), atol=1e-4)
    merged = [open_transformer(place / name / "transformer") for name in ("merged", "merged2")]
    assert merged[0].fingerprint() == merged[1].fingerprint()
    loaded = load_recipe(yaml.safe_load((one / "recipe.yaml").read_text()) | {"adapter": {"from": str(place / "lora")}})
    state = build_program(loaded, jax.devices()[:1]).init()
    for name, value in named(state.params):
        np.testing.assert_array_equal(value, trained.arrays[name])


def test_the_last_layer_of_a_joint_model_takes_them_too(place):
    captions = {"conditioning": "joint", "caption_length": 3, "caption_size": 8, "text_encoder": "hashed-words"}
    quiet = ("train.sample_images=0", "train.validation_batches=0", "optimizer.learning_rate=0.03")
    devices = jax.devices()[:1]
    run = train(recipe_of(place, captions, *quiet), devices=devices, run_dir=place / "joint").run_dir
    changes = {"kind": "dora", "targets": "all-linear"}
    recipe = adapter_recipe(place, run, "train.steps=2", "optimizer.learning_rate=0.3", "objective.shift=1", **changes)
    adapter = train(recipe, devices=devices, run_dir=place / "joint-adapter").run_dir
    options = {"steps": 3, "seed": 1}
    together = load_drawer(run, count=2, adapters={"a": adapter}).draw(["seven"] * 2, adapters=[None, "a"], **options)
    base, alone = (load_drawer(path, count=2).draw(["seven"] * 2, **options).astype(int) for path in (run, adapter))
    assert np.abs(together[0] - base[0]).max() <= 1
    assert np.abs(together[1] - alone[1]).max() <= 1
    assert np.abs(base[1] - alone[1]).max() > 3


def test_pictures_of_one_batch_take_the_adapters_that_are_chosen(place, base):
    run, _ = base
    runs = {}
    for name, adapter in {
        "a": {"targets": ["attention", "layers.modulation.map"]},
        "b": {"kind": "dora", "rank": 3, "targets": "mlp"},
    }.items():
        recipe = adapter_recipe(place, run, "train.steps=2", "optimizer.learning_rate=0.3", **adapter)
        runs[name] = train(recipe, devices=jax.devices()[:1], run_dir=place / f"adapter-{name}").run_dir
    drawer = load_drawer(run, count=3, adapters=runs)
    options = {"steps": 3, "seed": 1}
    together = drawer.draw(["7", "7", "7"], adapters=["b", None, "a"], **options).astype(int)
    alone = {name: load_drawer(path, count=3).draw(["7"] * 3, **options).astype(int) for name, path in runs.items()}
    alone[None] = load_drawer(run, count=3).draw(["7"] * 3, **options).astype(int)
    for number, name in enumerate(["b", None, "a"]):
        assert np.abs(together[number] - alone[name][number]).max() <= 1  # of 255, rounded
        others = (each for each in alone if each != name)
        assert all(np.abs(alone[name][number] - alone[each][number]).max() > 3 for each in others)
    with pytest.raises(UserError, match="adapters = 'c': expected one of a, b"):
        drawer.draw(["7"], adapters=["c"])
    out = place / "grid.png"
    with pytest.raises(UserError, match="is a run of an adapter itself"):
        pictures(str(runs["a"]), prompt=["7"], adapter=[f"b={runs['b']}"], out=str(out))
    pictures(str(run), prompt=["a=7", "base=7"], adapter=[f"a={runs['a']}"], out=str(out), steps=2)
    assert out.exists()
