import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainfw import backends
from trainfw.backends.cpu import decoding


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(("inputs", "widths"), [(12, [7]), (12, [8, 4, 4]), (7, [5, 2]), (16, [2048, 2]), (16, [2049])])
def test_a_joined_product_is_the_products(rows, inputs, widths):
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((inputs, width), np.float32) for width in widths]
    x = rng.standard_normal((rows, inputs), np.float32)
    w = decoding.joined([jnp.asarray(kernel) for kernel in kernels], rows)
    found = jax.jit(decoding.product)(jnp.asarray(x), w)
    np.testing.assert_allclose(found, x @ np.concatenate(kernels, axis=1), rtol=1e-4, atol=1e-5)


def test_it_is_for_few_rows_in_float32():
    def chosen(dtype, rows):
        return backends.resolve("decoding", backends.DecodingRequest(dtype, rows), backends.current()).call

    assert chosen("float32", 1) is chosen("float32", 16) is decoding
    assert chosen("float32", 17) is chosen("bfloat16", 1) is None


def test_its_options_are_ones_that_xla_has():
    compiled = jax.jit(lambda x: x @ x, compiler_options=decoding.compiler_options(1))
    assert compiled(jnp.ones((2, 2))).sum() == 8
