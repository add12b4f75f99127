"""Products with wide results: exact in one dtype, and narrow all the way back in two."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from trainfw.models.common.matmul import wide_einsum

SPECS = {"bskgh,btkh->bkgst": ((2, 5, 3, 2, 4), (2, 7, 3, 4)), "...d,df->...f": ((2, 5, 4), (4, 6))}


def operands(spec, dtype):
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(SPECS[spec])]


@pytest.mark.parametrize("spec", SPECS)
def test_in_float32_it_is_einsum(spec):
    x, y = operands(spec, "float32")
    np.testing.assert_array_equal(wide_einsum(spec, x, y), jnp.einsum(spec, x, y))
    check_grads(lambda x, y: wide_einsum(spec, x, y), (x, y), order=1, modes=["rev"], rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_narrow_operands_have_wide_results_and_narrow_gradients(spec):
    x, y = operands(spec, "bfloat16")
    result, back = jax.vjp(lambda x, y: wide_einsum(spec, x, y), x, y)
    assert result.dtype == jnp.float32
    wide = [array.astype(jnp.float32) for array in (x, y)]
    np.testing.assert_allclose(result, jnp.einsum(spec, *wide), rtol=1e-5, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(9), result.shape)
    expected = jax.vjp(lambda x, y: jnp.einsum(spec, x, y), *wide)[1](cotangent)
    for found, right in zip(back(cotangent), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), right, rtol=0.05, atol=0.1)
    products = [line for line in jax.jit(back).lower(cotangent).as_text().splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("bf16" in line and "f32" not in line for line in products)
