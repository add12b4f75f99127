"""Codes of frozen weights, against another implementation and against their own bounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw import UserError
from trainfw.quantization import dequantize, quantize
from trainfw.quantization.quantized import NF4


def weights(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) * 0.02


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def test_int8_is_what_qwix_makes():
    w = weights((64, 48))
    ours, theirs = quantize(w, "int8"), qwix.quantize(w, jnp.int8, channelwise_axes=[1])
    difference = np.abs(np.asarray(ours.codes, np.int32) - np.asarray(theirs.qvalue, np.int32))
    assert difference.max() <= 1  # 127 or 127.5 steps
    assert rms(dequantize(ours, jnp.float32) - w) <= 1.05 * rms(qwix.dequantize(theirs) - w)


def test_nf4_is_what_qwix_makes_but_for_the_scales_being_quantised():
    w = weights((256, 192))
    ours, theirs = quantize(w, "nf4", block=64), qwix.quantize(w, "nf4", tiled_axes={0: 64, 1: 1})
    low, high = np.asarray(ours.codes) & 15, np.asarray(ours.codes) >> 4
    codes = np.stack([low, high], axis=1).reshape(256, 192)
    assert np.mean(codes == np.asarray(theirs.qvalue)) > 0.99
    mine, other = (rms(x - w) for x in (dequantize(ours, jnp.float32), qwix.dequantize(theirs)))
    assert mine == pytest.approx(other, rel=0.01)


@settings(max_examples=2, deadline=None)
@given(
    layers=st.integers(1, 3),
    blocks=st.integers(1, 4),
    block=st.sampled_from([2, 16, 64]),
    columns=st.integers(1, 5),
    dim=st.sampled_from([-1, -2]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
)
def test_what_comes_back_is_near(layers, blocks, block, columns, dim, scale):
    shape = (layers, blocks * block, columns) if dim == -2 else (layers, columns, blocks * block)
    w = weights(shape, blocks) * scale
    for precision in ("int8", "nf4"):
        kept = quantize(w, precision, block=block, dim=dim)
        assert kept.shape == shape
        back = dequantize(kept, jnp.float32)
        largest = jnp.max(jnp.abs(w), axis=dim, keepdims=True)
        # Half of the widest gap between codes; NF4's scales are off by half of a 255th of a row's range too.
        bound = 0.5 / 127 if precision == "int8" else max(b - a for a, b in itertools.pairwise(NF4)) / 2 + 0.006
        assert bool(jnp.all(jnp.abs(back - w) <= bound * jnp.maximum(largest, jnp.max(jnp.abs(w))) + 1e-12))
        again = dequantize(quantize(back, precision, block=block, dim=dim), jnp.float32)
        np.testing.assert_allclose(again, back, atol=float(0.01 * jnp.max(jnp.abs(w)) + 1e-12))


def test_dims_of_codes_carry_the_names_of_the_weight():
    kept = jax.eval_shape(lambda w: quantize(w, "nf4", block=32), jax.ShapeDtypeStruct((3, 64, 8), jnp.float32))
    named = kept.dims(("layers", "heads", "embed"), {"layers", "heads"})
    assert (named.codes, named.scales) == (("layers", "heads", "embed"),) * 2
    # What stays split is split; the rest of these is small, and whole everywhere.
    assert named.low == ("layers", "heads", None)
    assert kept.dims(("layers", "embed", "heads"), {"layers", "heads"}).step == ("layers", None, None)


@pytest.mark.parametrize(("size", "block"), [(48, 32), (7, 2), (64, 3)])
def test_blocks_must_divide(size, block):
    with pytest.raises(UserError, match=f"block = {block}: expected an even number that divides {size}"):
        quantize(weights((size, 4)), "nf4", block=block)
