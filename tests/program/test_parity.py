"""Any product of mesh axes computes what one device does (the table of benchmarks/parity.py), and trains alike."""

from __future__ import annotations

import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import parity
from tests.helpers import chip_of_halves, random_batches
from trainfw import build_program, load_recipe

HERE = 8
QUICK = {
    "llama fsdp=8 remat=full",
    "llama fsdp=2 context=2 tensor=2 remat=full accumulation_steps=4",
    "gemma pipeline=2 context=2 tensor=2 context_attention=gathered accumulation_steps=2",
    "llama dpo pipeline=2 fsdp=2 tensor=2 remat=full accumulation_steps=2",
    "mixtral expert=2 tensor=4 scan_layers=false",
}


def here() -> list:
    rows = {row.name: row for row in parity.combinations() if row.devices <= HERE}
    assert rows.keys() >= QUICK
    return [pytest.param(row, id=name, marks=[] if name in QUICK else pytest.mark.long) for name, row in rows.items()]


@pytest.mark.parametrize("row", here())
def test_loss_and_gradients_agree_with_one_device(row):
    result = parity.compare(row)
    assert result.ok, f"loss {result.loss:.1e}, {result.worst} {result.gradients[result.worst]:.1e}"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, parity.__file__, *arguments], capture_output=True, text=True)


@pytest.mark.long
def test_sixteen_devices_agree_with_one():
    ran = run("--filter", "16 devices")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = sum(row.devices == 16 for row in parity.combinations())
    assert rows >= 3
    assert ran.stdout.splitlines()[-1] == f"{rows} of {rows} agree (limit 1e-05)"


@pytest.mark.long
def test_a_filter_that_fits_no_row_is_refused():
    ran = run("--filter", "tensr=2")
    assert ran.returncode == 2
    assert ran.stderr == "--filter tensr=2: no combination's name contains this; did you mean 'tensor=2'?\n"


def test_what_does_not_agree_is_told():
    a = np.ones(3, np.float32)
    assert parity.relative(a * np.float32(1 + 2e-5), a) > parity.LIMIT
    for error in (2e-5, math.nan):
        result = parity.Agreement("", 0.0, {"right": 0.0, "wrong": error})
        assert (result.ok, result.worst) == (False, "wrong")
        assert not parity.Agreement("", error, {"right": 0.0}).ok


# --- Training ------------------------------------------------------------------------------------

MODEL = """
name: parity
model: {preset: tiny, vocab_size: 64, num_heads: 4, num_kv_heads: 2}
data: {sequence_length: 32}
train: {steps: 20, global_batch_size: 8}
optimizer: {name: OPTIMIZER, learning_rate: 1.0e-3, warmup_steps: 4}
"""


def program_of(tmp_path, devices, overrides=(), optimizer="adamw"):
    path = tmp_path / "recipe.yaml"
    path.write_text(MODEL.replace("OPTIMIZER", optimizer))
    return build_program(load_recipe(path, list(overrides)), devices)


def train(program, state):
    """(losses, the state in the end)"""
    losses = []
    for batch in random_batches(program.recipe, program.recipe.train.steps):
        state, metrics = program.train_step(state, program.shard_batch(batch))
        losses.append(metrics["loss"].value())
    return losses, jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """States to start from, as they are on one device."""
    program = program_of(tmp_path_factory.mktemp("start"), jax.devices()[:1])
    state = jax.tree.map(np.asarray, program.init())
    # As adapters start: the gradients of all other layers' weights are nothing but rounding at first.
    zeros = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if {"output", "down"} & {getattr(key, "key", "") for key in path} else x, state
    )
    return {"random": state, "zeros": zeros}


@pytest.fixture(scope="module")
def one_device(start, tmp_path_factory):
    program = program_of(tmp_path_factory.mktemp("one"), jax.devices()[:1])
    return {name: train(program, jax.device_put(state, program.mesh.devices.item())) for name, state in start.items()}


def test_the_loss_falls(one_device):
    for losses, _ in one_device.values():
        assert losses[-1] < losses[0] - 0.05


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_devices_does_not_matter(seed, start, one_device, tmp_path):
    order = np.random.default_rng(seed).permutation(np.array(jax.devices()))
    program = program_of(tmp_path, list(order), ["parallel={fsdp: 2, context: 2, tensor: 2}", "train.remat=full"])
    assert list(program.mesh.devices.flat) == list(order)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    for name, state in start.items():
        np.testing.assert_allclose(train(program, jax.device_put(state, shardings))[0], one_device[name][0], rtol=3e-6)


def test_a_placed_mesh_trains_alike(one_device, tmp_path):
    # Tensor's pairs lie half a chip apart: cores 0, 4, 1, 5, ...
    overrides = ["hardware={topology: %s, lnc: 1}" % chip_of_halves(tmp_path), "parallel.tensor=2"]  # noqa: UP031
    program = program_of(tmp_path, jax.devices(), overrides)
    assert [device.id for device in program.mesh.devices.flat] != list(range(8))
    np.testing.assert_allclose(train(program, program.init())[0], one_device["random"][0], rtol=3e-6)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["parameters", "gradients", "optimizer"])
def test_what_fsdp_shards_changes_no_numbers(stage, one_device, tmp_path):
    overrides = ["parallel={data: 2, fsdp: 2, tensor: 2, fsdp_shards: %s}" % stage, "train.accumulation_steps=2"]  # noqa: UP031
    program = program_of(tmp_path, jax.devices(), overrides)
    losses, state = train(program, program.init())
    np.testing.assert_allclose(losses, one_device["random"][0], rtol=3e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(one_device["random"][1]), strict=True):
        # Adam divides by the size of gradients: near zero their rounding, which is the CPU's, shows in full.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=pytest.mark.long) for name in ("lion", "adafactor", "muon")]
)
def test_every_optimizer_agrees_on_a_mesh(optimizer, tmp_path):
    one = program_of(tmp_path, jax.devices()[:1], optimizer=optimizer)
    expected, _ = train(one, one.init())
    for stage in ("parameters", "optimizer"):  # `gradients` is updated as `optimizer` is
        overrides = ["parallel.tensor=2", f"parallel.fsdp_shards={stage}"]
        program = program_of(tmp_path, jax.devices()[:4], overrides, optimizer)
        np.testing.assert_allclose(train(program, program.init())[0], expected, rtol=1e-4)
