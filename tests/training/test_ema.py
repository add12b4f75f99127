"""Runs that average their weights: what is kept, validated, written and read."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import trainfw
from tests.helpers import Heard, random_batches, tiny_recipe
from tests.optim.test_ema import averaged
from trainfw import UserError, build_program
from trainfw.checkpoint import SavedParameters
from trainfw.optim import average_of
from trainfw.training import RunDirectory
from trainfw.weights import export_model, merge, open_base, read_adapter

DECAY = 0.2  # above which the second step's begins
EVERY_STEP = ("checkpoint={every: 1, keep_last: 9}", "train.steps=5", f"optimizer.ema={DECAY}")


def run(directory, *overrides, heard=None, **given):
    recipe, heard = tiny_recipe(directory, *EVERY_STEP, *overrides), heard or Heard()
    return trainfw.train(recipe, run_dir=directory / "run", devices=jax.devices()[:1], reporter=heard, **given)


def saved(path, step, *, average):
    """A checkpoint's arrays by name: the weights, or their average."""
    opened = SavedParameters(path / "checkpoints" / str(step), averaged=average)
    like = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in opened.arrays.items()}
    return {name: np.asarray(opened.read(name, one)) for name, one in like.items()}


def same(trees):
    return all(np.array_equal(one, trees[1][name]) for name, one in trees[0].items())


def values(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    heard = Heard()
    return run(tmp_path_factory.mktemp("averaged"), heard=heard).run_dir, heard.notes


def test_what_is_saved_is_the_average_of_the_steps(finished):
    path, _ = finished
    steps = [saved(path, step, average=False) for step in range(1, 6)]
    for name, found in saved(path, 5, average=True).items():
        np.testing.assert_allclose(found, averaged(DECAY, [step[name] for step in steps]), rtol=1e-5, atol=1e-7)


def test_a_run_goes_on_bit_for_bit_and_not_without_its_average(finished, tmp_path):
    class Stop(trainfw.Callback):
        def step(self, step, metrics):
            return "enough" if step == 3 else None

    assert run(tmp_path, callbacks=[Stop()]).step < 5
    with pytest.raises(UserError, match=r"optimizer\.ema: 0\.2 there, None here .* cannot change in a run"):
        run(tmp_path, "optimizer.ema=null")
    parts = run(tmp_path).run_dir
    for average in (True, False):
        assert same([saved(path, 5, average=average) for path in (finished[0], parts)])


def test_a_skipped_step_is_left_out_and_a_mesh_averages_as_one_device_does(tmp_path):
    settings = ("faults.non_finite=skip", f"optimizer.ema={DECAY}", "parallel.fsdp_shards=gradients")
    recipe = tiny_recipe(tmp_path, *settings)
    batches, states = random_batches(recipe, 3), []
    batches[1]["loss_mask"] = batches[1]["loss_mask"] * np.float32("nan")
    for devices in (1, 4):
        program = build_program(recipe, jax.devices()[:devices])
        step, state, averages = program.compile_train_step(), program.init(), []
        for batch in batches:
            state, _ = step(state, program.shard_batch(batch))
            averages.append(jax.tree.map(np.asarray, average_of(state.opt_state)))
        jax.tree.map(np.testing.assert_array_equal, *averages[:2])
        states.append(averages[-1])
        learnt = program.learnt(state)
        jax.tree.map(np.testing.assert_array_equal, learnt, averages[-1])
        assert jax.tree.map(lambda x: x.sharding, learnt) == jax.tree.map(lambda x: x.sharding, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *states)


def test_the_average_is_what_is_validated_loaded_and_exported(finished, tmp_path):
    path, notes = finished
    validations = [note for note in notes if note.startswith("validation at step")]
    assert all(", by the average of the weights (ema 0.2)" in note for note in validations)
    assert [row["validation_ema"] for row in RunDirectory(path).metrics() if "validation_loss" in row] == [DECAY] * 2
    by, ways = {}, {None: True, "ema": True, "raw": False}
    for weights, average in ways.items():
        by[weights], _ = trainfw.evaluate(path, weights=weights)
        assert (by[weights].ema is not None) == average
        model, _ = trainfw.load_model(path, weights=weights)
        said = export_model(str(path), str(tmp_path / str(weights)), weights=weights)
        assert said.endswith("(optimizer.ema = 0.2)" if average else "the weights themselves, no average")
        written, _ = trainfw.load_model(tmp_path / str(weights))
        assert same([saved(path, 5, average=average), values(model)])
        assert same([values(model), values(written)])
    (*_, last) = (row["validation_loss"] for row in RunDirectory(path).metrics() if "validation_loss" in row)
    assert by[None].loss == by["ema"].loss == pytest.approx(last, rel=1e-6)
    assert abs(by["raw"].loss - by["ema"].loss) > 1e-4
    for wrong in ("ema", "average"):
        with pytest.raises(UserError, match=rf"^weights '{wrong}' \(--weights\): "):
            trainfw.load_model(tmp_path / "raw", weights=wrong)


def test_another_run_starts_from_the_average_and_says_so(finished, tmp_path):
    (path, _), heard = finished, Heard()
    first = run(tmp_path, f"model={{from: {path}}}", "train.steps=1", "optimizer.learning_rate=1e-30", heard=heard)
    assert any(note.startswith(f"model.from: of {path}, the average of the weights") for note in heard.notes)
    assert same([saved(path, 5, average=True), saved(first.run_dir, 1, average=False)])
    meta = SavedParameters(first.run_dir / "checkpoints" / "1").meta
    hashes = [open_base(str(path), weights=weights).fingerprint() for weights in (None, "raw")]
    assert meta["base"]["hash"] == hashes[0] != hashes[1]


def test_an_adapter_is_averaged_too(finished, tmp_path):
    base, _ = finished
    path = str(run(tmp_path, f"model={{from: {base}}}", "adapter={rank: 2, alpha: 4}", "train.steps=2").run_dir)
    steps = [saved(tmp_path / "run", step, average=False) for step in (1, 2)]
    adapters = {weights: read_adapter(path, open_base(str(base)).config, weights=weights) for weights in (None, "raw")}
    for name, found in adapters[None].arrays.items():
        np.testing.assert_allclose(found, averaged(DECAY, [step[name] for step in steps]), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(adapters["raw"].arrays[name], steps[-1][name])
    assert same([merge(path).adapter.arrays, adapters[None].arrays])
    said = export_model(path, str(tmp_path / "peft"), format="peft")
    assert said.endswith("note: the average of the weights (optimizer.ema = 0.2)")
    written = read_adapter(str(tmp_path / "peft"), open_base(str(base)).config)
    assert same([written.arrays, adapters[None].arrays])
