from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainfw.models.common.matmul import frozen_product, matmul


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_input_has_a_gradient_whatever_multiplies(dtype):
    # In bfloat16 a CPU's product is a kernel of our own, which has a gradient and no transpose.
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, [(2, 5, 16), (16, 24), (2, 5, 24)], strict=True))
    y, back = jax.vjp(lambda x, w: frozen_product(matmul, x, w), x, w)
    dx, dw = back(dy)
    np.testing.assert_array_equal(y, matmul(x, w))
    np.testing.assert_array_equal(dx, jax.vjp(lambda x: matmul(x, w), x)[1](dy)[0])
    assert dx.dtype == dtype
    assert not jnp.any(dw)
