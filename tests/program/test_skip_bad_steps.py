"""Which steps are spikes, against plain NumPy; and what a bad step leaves as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import random_batches, tiny_recipe
from trainfw import build_program
from trainfw.program.skip_bad_steps import judge, start_guard


def run(values, sigma):
    guard, spikes = start_guard(), []
    step = jax.jit(judge, static_argnums=2)
    for value in values:
        spike, guard = step(guard, jnp.asarray(value, jnp.float32), sigma)
        spikes.append(bool(spike))
    return spikes, guard


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(21, 49))
def test_the_first_fifty_steps_have_a_plain_mean_and_variance(seed, count):
    values = np.random.default_rng(seed).normal(5, 1, (count, 2))
    spikes, guard = run(values, 100.0)
    assert not any(spikes)
    np.testing.assert_allclose(guard["mean"], values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(guard["variance"], values.var(0), rtol=1e-3)


def test_a_spike_of_either_is_seen_and_not_remembered():
    values = np.random.default_rng(0).normal(5, 0.1, (150, 2))
    calm = run(values, 6.0)
    assert not any(calm[0])
    for which in range(2):
        spiky = values.copy()
        spiky = np.insert(spiky, 100, spiky[100], axis=0)
        spiky[100, which] = 7.0
        spikes, guard = run(spiky, 6.0)
        assert np.flatnonzero(spikes).tolist() == [100]
        np.testing.assert_array_equal(guard["mean"], calm[1]["mean"])


@pytest.mark.parametrize("value", [np.inf, np.nan, -np.inf])
def test_what_is_not_finite_is_not_remembered(value):
    values = np.random.default_rng(0).normal(5, 0.1, (40, 2))
    calm = run(values, 6.0)[1]
    values = np.insert(values, 30, [value, 5.0], axis=0)
    np.testing.assert_array_equal(run(values, 6.0)[1]["mean"], calm["mean"])


def test_nothing_is_a_spike_before_twenty_steps():
    spikes, _ = run([[5, 5]] * 19 + [[500, 500]], 3.0)
    assert not any(spikes)
    spikes, _ = run([[5, 5]] * 20 + [[500, 500]], 3.0)
    assert spikes[-1]


@pytest.mark.parametrize("layout", [{}, {"parallel.fsdp": 2, "parallel.data": 2}], ids=["one device", "fsdp, data"])
def test_a_skipped_step_leaves_parameters_and_moments_as_they_were(tmp_path, layout):
    settings = [f"{key}={value}" for key, value in layout.items()]
    recipe = tiny_recipe(tmp_path, "faults.non_finite=skip", "train.steps=4", *settings)
    program = build_program(recipe, jax.devices()[: 4 if layout else 1])
    state = program.init()
    good, bad = random_batches(recipe, 2)
    bad["loss_mask"][3, 5] = np.nan
    state, _ = program.train_step(state, program.shard_batch(good))
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = program.train_step(state, program.shard_batch(bad))
    assert np.isnan(metrics["loss"].value())
    after = jax.device_get((state.params, state.opt_state))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if np.issubdtype(old.dtype, np.floating):
            np.testing.assert_array_equal(old, new)
        else:
            assert new == old + 1  # the schedule goes on
    assert int(state.step) == 2
    state, metrics = program.train_step(state, program.shard_batch(good))
    assert np.isfinite(metrics["loss"].value())
