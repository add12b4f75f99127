"""Products of 8 bits: how far they are from wide ones, both ways, and that a run of them learns as a wide one does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tiny_recipe
from trainfw import backends
from trainfw.backends import select
from trainfw.program import build_program
from trainfw.quantization.fp8 import fp8_matmul

E4M3, E5M2 = 2.0**-4, 2.0**-3
"""Relative rounding errors at most: three and two bits of mantissa."""


def relative(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(1e-12, 1e12), st.floats(1e-6, 1e6))
def test_values_and_gradients_are_those_of_wide_products_to_the_rounding_of_operands(seed, of_x, of_w):
    keys = jax.random.split(jax.random.key(seed), 3)
    x, w, dy = (jax.random.normal(key, shape) for key, shape in zip(keys, ((24, 16), (16, 40), (24, 40)), strict=True))
    x, w = x * of_x, w * of_w
    y, back = jax.vjp(fp8_matmul, x, w)
    wide, wide_back = jax.vjp(jnp.matmul, x, w)
    assert relative(y, wide) < 2 * E4M3
    for found, expected in zip(back(dy), wide_back(dy), strict=True):
        assert relative(found, expected) < E4M3 + E5M2


def test_what_8_bits_hold_is_exact():
    x, w = jnp.array([[448.0, -2.0], [0.0, 1.75]]), jnp.array([[0.5, 448.0], [1.0, -3.5]])
    np.testing.assert_array_equal(fp8_matmul(x, w), x @ w)


def test_zeros_and_their_gradients_are_zeros():
    y, back = jax.vjp(fp8_matmul, jnp.zeros((4, 8)), jnp.zeros((8, 6)))
    for found in (y, *back(jnp.zeros((4, 6)))):
        np.testing.assert_array_equal(found, 0.0)


def test_the_smallest_numbers_stay_finite():
    tiny = float(jnp.finfo(jnp.float32).tiny)
    y, back = jax.vjp(fp8_matmul, jnp.full((4, 8), tiny), jnp.ones((8, 6)))
    assert all(np.isfinite(found).all() for found in (y, *back(jnp.full((4, 6), 8 * tiny))))


@pytest.mark.parametrize(("backend", "forward"), [("gpu", "f8E4M3FN"), ("neuron", "f8E4M3>")])
def test_the_format_is_one_that_the_backend_has(monkeypatch, backend, forward):
    monkeypatch.setattr(backends, "current", lambda: select.BACKENDS[backend])
    text = jax.jit(lambda x, w: fp8_matmul(x, w)).lower(jnp.ones((8, 16)), jnp.ones((16, 4))).as_text()
    assert all(line.count(forward) == 2 for line in text.splitlines() if "dot_general" in line)


def test_what_is_not_finite_stays_so():
    """A step that diverged must be seen to."""
    assert not np.isfinite(fp8_matmul(jnp.array([[jnp.inf, 1.0]]), jnp.ones((2, 2)))).any()
    assert not np.isfinite(fp8_matmul(jnp.array([[jnp.nan, 1.0]]), jnp.ones((2, 2)))).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_operands_are_narrow_and_its_results_are_not(dtype):
    x, w = jnp.ones((8, 16), dtype), jnp.ones((16, 4), dtype)
    step = jax.jit(lambda x, w: jax.vjp(fp8_matmul, x, w)[1](jnp.ones((8, 4), dtype)))
    assert all(g.dtype == dtype for g in step(x, w))
    products = [line for line in step.lower(x, w).as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 2
    assert all("f8E5M2" in line and "f8E4M3FN" in line for line in products)


def losses(tmp_path, *overrides, steps=40, devices=1):
    recipe = tiny_recipe(tmp_path, "train.compute_dtype=bfloat16", *overrides)
    program = build_program(recipe, jax.devices()[:devices])
    state, rng, told = program.init(), np.random.default_rng(0), []
    rows, length = program.abstract_batch["tokens"].shape
    for _ in range(steps):
        # A token is followed by one that depends on it, to be learnt.
        tokens = rng.integers(0, 64, (rows, 1)) + np.cumsum(rng.integers(1, 3, (rows, length + 1)), axis=1)
        tokens = (tokens % 64).astype(np.int32)
        whole = np.ones((rows, length), np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), whole.shape)
        arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": whole, "positions": positions}
        batch = program.shard_batch(arrays | {"loss_mask": whole.astype(np.float32)})
        state, metrics = program.train_step(state, batch)
        told.append(metrics["loss"].value())
    return np.array(told)


FP8 = "train.matmul_dtype=fp8"


@pytest.mark.long
def test_its_loss_is_that_of_bfloat16(tmp_path):
    wide, narrow = losses(tmp_path), losses(tmp_path, FP8)
    assert wide[-1] < wide[0] - 1.0
    assert not np.array_equal(wide, narrow)
    np.testing.assert_allclose(narrow, wide, rtol=0.03)
    assert abs(narrow[-10:].mean() - wide[-10:].mean()) < 0.01 * wide[-10:].mean()


@pytest.mark.parametrize(
    ("devices", "how"),
    [
        (4, ("parallel={fsdp: 2, tensor: 2}",)),
        pytest.param(
            *(1, ("train.scan_layers=false", "train.remat=dots", "train.accumulation_steps=2")), marks=pytest.mark.long
        ),
    ],
)
def test_however_it_runs_its_loss_is_the_same_to_the_rounding(tmp_path, devices, how):
    found = losses(tmp_path, FP8, *how, steps=10, devices=devices)
    np.testing.assert_allclose(found, losses(tmp_path, FP8, steps=10), rtol=0.01)


def test_experts_routers_and_the_head_stay_wide(tmp_path):
    moe = "model.moe={num_experts: 4, experts_per_token: 2}"
    program = build_program(tiny_recipe(tmp_path, FP8, moe), jax.devices()[:1])
    text = program.train_step.lower(program.abstract_state, program.abstract_batch).as_text()
    narrow = [line for line in text.splitlines() if "dot_general" in line and "f8E4M3FN" in line]
    assert len(narrow) == 4 * 3  # attention's four maps, forward and both gradients


def test_an_adapter_of_a_narrow_base_is_wide(tmp_path):
    program = build_program(tiny_recipe(tmp_path, FP8, "adapter={rank: 4, targets: all-linear}"), jax.devices()[:1])
    text = program.train_step.lower(program.abstract_state, program.abstract_batch).as_text()
    narrow = [line for line in text.splitlines() if "dot_general" in line and "f8E" in line]
    assert len(narrow) == 7 * 2  # the base's maps, and the gradients of what they read
