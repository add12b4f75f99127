import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainfw import backends
from trainfw.backends import own_kernels, resolve
from trainfw.backends.base import MatmulRequest
from trainfw.backends.cpu import products
from trainfw.models.common.matmul import matmul, over_rows

X, W = (jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate([(2, 24, 16), (16, 40)]))


def test_products_and_gradients_are_rounded_once():
    y, back = jax.vjp(matmul, X, W)
    dy = jax.random.normal(jax.random.key(2), y.shape, y.dtype)
    x, w, d = (np.float64(a) for a in (X, W, dy))
    expected = (x @ w, d @ w.T, np.einsum("bsi,bso->io", x, d))
    for found, exact in zip((y, *back(dy)), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(found), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(16, 16), (40, 2), (2, 40)], ids=["alike", "the first wide", "the second wide"])
def test_sums_over_rows(dtype, widths):
    x, y = (jax.random.normal(jax.random.key(n), (24, width)).astype(dtype) for n, width in enumerate(widths))
    found = jax.jit(over_rows)(x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.float64(x).T @ np.float64(y), rtol=1e-5, atol=1e-5)


def test_every_product_is_of_bfloat16_with_a_float32_result():
    # The form that has a fast kernel: from another, XLA makes products of float32.
    text = jax.jit(jax.grad(lambda x, w: jnp.sum(matmul(x, w) ** 2), (0, 1))).lower(X, W).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 3
    assert all(line.count("bf16>") == 2 and line.rstrip().split(" loc")[0].endswith("f32>") for line in dots)


def test_only_where_it_gains():
    cpu = backends.current()
    for dtype in ("bfloat16", "float32"):
        assert resolve("matmul", MatmulRequest(dtype), cpu).call is products.matmul
    assert resolve("matmul", MatmulRequest("float16"), cpu).call is None
    with own_kernels(False):
        assert resolve("matmul", MatmulRequest("bfloat16"), cpu).call is None
    assert resolve("matmul", MatmulRequest("bfloat16"), cpu).call is products.matmul
