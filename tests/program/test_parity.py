"""The same numbers on any mesh, with any accumulation, scanned or unrolled."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.helpers import random_batches
from trainfw import build_program, load_recipe

MODEL = """
name: parity
model: {preset: tiny, vocab_size: 64, num_heads: 4, num_kv_heads: 2, num_layers: 3}
data: {sequence_length: 32}
train: {steps: 20, global_batch_size: 8}
optimizer: {name: OPTIMIZER, learning_rate: 1.0e-3, warmup_steps: 4}
"""

VARIANTS = {
    "fsdp 4": (4, ["parallel.fsdp=4"]),
    "data 2, fsdp 2": (4, ["parallel.data=2", "parallel.fsdp=2"]),
    "tensor 2, fsdp 2": (4, ["parallel.tensor=2", "parallel.fsdp=2"]),
    "fsdp 8": (8, ["parallel.fsdp=8"]),
    "accumulation 4": (1, ["train.accumulation_steps=4"]),
    "accumulation 4, fsdp 2": (2, ["train.accumulation_steps=4"]),
    "unrolled": (1, ["train.scan_layers=false"]),
    "unrolled, tensor 2, fsdp 2": (4, ["train.scan_layers=false", "parallel.tensor=2"]),
    "remat full, fsdp 4": (4, ["train.remat=full"]),
    "more tensor than kv heads": (8, ["parallel.tensor=4", "train.remat=full"]),
    # Tensor's pairs lie half a chip apart: cores 0, 4, 1, 5, ...
    "placed on a chip": (8, ["hardware={topology: trn2.3xlarge, lnc: 1}", "parallel.tensor=2"]),
}


STAGES = {
    "fsdp 4": ["parallel.fsdp=4"],
    "data 2, fsdp 2": ["parallel.data=2", "parallel.fsdp=2"],
    "tensor 2, fsdp 2": ["parallel.tensor=2", "parallel.fsdp=2"],
}


def losses(tmp_path, devices: int, overrides: list[str], optimizer: str = "adamw") -> list[float]:
    return train(tmp_path, devices, overrides, optimizer)[0]


def train(tmp_path, devices: int, overrides: list[str], optimizer: str = "adamw"):
    """(losses, the state in the end)"""
    path = tmp_path / "recipe.yaml"
    path.write_text(MODEL.replace("OPTIMIZER", optimizer))
    recipe = load_recipe(path, overrides)
    program = build_program(recipe, jax.devices()[:devices])
    state, result = program.init(), []
    for batch in random_batches(recipe, recipe.train.steps):
        state, metrics = program.train_step(state, program.shard_batch(batch))
        result.append(metrics["loss"].value())
    return result, state


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_devices_does_not_matter(seed, reference, tmp_path, monkeypatch):
    order = np.random.default_rng(seed).permutation(jax.devices())
    monkeypatch.setattr(jax, "devices", lambda *_: list(order))
    np.testing.assert_allclose(losses(tmp_path, 8, ["parallel.tensor=2", "parallel.data=2"]), reference, rtol=3e-6)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return train(tmp_path_factory.mktemp("reference"), 1, [])


@pytest.fixture(scope="module")
def reference(one_device):
    return one_device[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_twenty_steps_agree_with_one_device(name, reference, tmp_path):
    np.testing.assert_allclose(losses(tmp_path, *VARIANTS[name]), reference, rtol=3e-6)


@pytest.mark.parametrize("layout", STAGES)
@pytest.mark.parametrize("stage", ["gradients", "optimizer"])
def test_what_fsdp_shards_changes_no_numbers(stage, layout, one_device, tmp_path):
    overrides = [*STAGES[layout], f"parallel.fsdp_shards={stage}", "train.accumulation_steps=2"]
    found, state = train(tmp_path, 4, overrides)
    np.testing.assert_allclose(found, one_device[0], rtol=3e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(one_device[1]), strict=True):
        scale = np.abs(np.asarray(theirs)).max()
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5 * scale)


def test_the_loss_falls(reference):
    assert reference[-1] < reference[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lion", "adafactor", "muon"])
def test_every_optimizer_agrees_on_a_mesh(optimizer, tmp_path):
    one = losses(tmp_path, 1, [], optimizer)
    for stage in ("parameters", "gradients", "optimizer"):
        overrides = ["parallel.tensor=2", f"parallel.fsdp_shards={stage}"]
        np.testing.assert_allclose(losses(tmp_path, 4, overrides, optimizer), one, rtol=1e-4)
