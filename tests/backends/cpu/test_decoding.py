import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw import backends
from trainfw.quantization import quantize


def chosen(dtype, rows, kept=None):
    request = backends.DecodingRequest(dtype, rows, kept or dtype)
    return backends.resolve("decoding", request, backends.current()).call


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(("inputs", "width"), [(12, 7), (7, 5), (16, 2048), (16, 2049)])
def test_products_in_float32_are_the_products(rows, inputs, width):
    rng, product = np.random.default_rng(0), chosen("float32", rows)
    w, x = rng.standard_normal((inputs, width), np.float32), rng.standard_normal((rows, inputs), np.float32)
    found = jax.jit(product.multiply)(x, w.T if product.turned else w)
    np.testing.assert_allclose(found, x @ w, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from([1, 3]), st.sampled_from([5, 64]), st.integers(0, 2**20), st.sampled_from([0.0, 3.0, 20.0]))
def test_narrow_weights_are_multiplied_as_exactly_as_wide_ones(rows, inputs, seed, spread):
    """Whatever the magnitudes of a row: to 1 in a million of the largest product."""
    rng, width = np.random.default_rng(seed), 33
    x = rng.standard_normal((rows, inputs)) * np.exp(rng.uniform(-spread, spread, (rows, inputs)))
    x, w = x.astype(np.float32), rng.standard_normal((inputs, width)).astype(np.float32)
    x[0] *= float(rng.integers(0, 2))  # a row of zeros
    halves, kept = jnp.asarray(w, jnp.bfloat16), quantize(jnp.asarray(w), "int8")
    wide = np.asarray(kept.codes, np.float64) * np.asarray(kept.scales, np.float64)
    bound = inputs * np.abs(x).max(axis=1, keepdims=True) * np.abs(w).max() * 1e-6
    multiply = jax.jit(chosen("float32", rows, "bfloat16").multiply)
    found = multiply(jnp.asarray(x), halves.T)
    assert np.all(np.abs(found - x.astype(np.float64) @ np.asarray(halves, np.float64)) <= bound)
    found = multiply(jnp.asarray(x), kept.codes.T, kept.scales[0])
    assert np.all(np.abs(found - x.astype(np.float64) @ wide) <= bound)
    half = jnp.asarray(x, jnp.bfloat16)
    found = multiply(half, halves.T)
    assert np.all(np.abs(found - np.asarray(half, np.float64) @ np.asarray(halves, np.float64)) <= bound)


def test_it_says_what_it_is_not_for():
    assert chosen("float32", 16) is not None
    assert chosen("float32", 17) is chosen("bfloat16", 1, "float32") is chosen("float32", 1, "nf4") is None
    assert chosen("float32", 17, "int8").turned
    assert not chosen("float32", 1).turned


def test_its_options_are_ones_that_xla_has():
    options = chosen("float32", 1).compiler_options
    assert options
    assert jax.jit(lambda x: x @ x, compiler_options=dict(options))(jnp.ones((2, 2))).sum() == 8
