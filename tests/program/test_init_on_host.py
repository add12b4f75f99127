from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.helpers import random_batches, tiny_recipe
from trainfw import backends, build_program
from trainfw.program import init_state as host


@pytest.fixture
def as_neuron():
    yield lambda: backends.prepare(as_backend="neuron")
    backends.prepare()


@pytest.mark.parametrize("at_once", [1, pytest.param(2**20, marks=pytest.mark.long)])
def test_the_state_from_the_host_is_the_state_from_the_devices(at_once, as_neuron, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_AT_ONCE", at_once)
    recipe = tiny_recipe(tmp_path, "parallel.tensor=2")
    expected = build_program(recipe).init()
    as_neuron()
    found = build_program(recipe).init()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.long
def test_a_step_under_neurons_contract_is_the_same_step(as_neuron, tmp_path):
    recipe = tiny_recipe(tmp_path)
    batch = random_batches(recipe, 1)[0]

    def loss() -> float:
        program = build_program(recipe)
        return program.train_step(program.init(), program.shard_batch(batch))[1]["loss"].value()

    expected = loss()
    as_neuron()
    assert loss() == pytest.approx(expected, rel=1e-6)
