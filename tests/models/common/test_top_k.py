"""The largest of many without topk and sort, held to `jax.lax.top_k` and to NumPy's sort."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainfw import backends
from trainfw.hardware import load_topology
from trainfw.models.common.top_k import MOST_ROUNDS, choose_top_k, iterative_top_k, likeliest, top_k_problem

V = 24
# Few distinct numbers, so that many are equal, or any at all; zeros of one sign, and no subnormal numbers.
numbers = st.one_of(
    st.sampled_from([-math.inf, -3e38, -2.0, -1.0, 0.0, 1e-30, 1.0, 1.0000001, 2.0, 3e38]),
    st.floats(width=32, allow_nan=False, allow_subnormal=False).map(lambda x: x + 0.0),
)
rows = st.lists(numbers, min_size=V, max_size=V).map(lambda row: np.array(row, np.float32))
logits = st.lists(
    st.one_of(
        st.sampled_from([-math.inf, -60.0, -2.0, 0.0, 0.5, 3.0]),
        st.floats(-20, 20, width=32, allow_subnormal=False).map(lambda x: x + 0.0),
    ),
    min_size=V,
    max_size=V,
).map(lambda row: np.array(row, np.float32))

iterative = jax.jit(iterative_top_k, static_argnums=1)
native = jax.jit(jax.lax.top_k, static_argnums=1)
allowed = jax.jit(lambda x_V, k, p, cut: likeliest(x_V, k, p if cut else None), static_argnums=(1, 3))


def in_order(x_V: np.ndarray) -> np.ndarray:
    """Places, the largest first and of equals the first."""
    return np.argsort(-x_V.astype(np.float64), kind="stable")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows, st.sampled_from([1, 2, 8, V]))
def test_rounds_choose_what_top_k_does(x_V, k):
    found, expected = iterative(x_V, k), native(x_V, k)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1].dtype == expected[1].dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounds_choose_along_the_last_dim_of_any_shape_and_keep_the_dtype(dtype):
    x = jax.random.randint(jax.random.key(0), (3, 5, V), -4, 4).astype(dtype)
    for found, expected in zip(iterative(x, 3), native(x, 3), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(found.astype("float32"), expected.astype("float32"))
    assert [part.shape for part in iterative_top_k(x, 0)] == [(3, 5, 0)] * 2


def test_the_gradient_goes_to_the_chosen():
    x = jax.random.randint(jax.random.key(1), (4, V), -4, 4).astype(jnp.float32)
    probe = jax.random.normal(jax.random.key(2), (4, 5))
    gradients = [jax.grad(lambda x, f=f: jnp.sum(f(x, 5)[0] * probe))(x) for f in (iterative_top_k, jax.lax.top_k)]
    np.testing.assert_array_equal(*gradients)


def test_nan_is_chosen_last_and_no_place_twice():
    x = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.nan])
    assert iterative_top_k(x, 2)[1].tolist() == [1, 0]
    assert sorted(iterative_top_k(x, 4)[1].tolist()) == [0, 1, 2, 3]


def test_what_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="k = 4 of 3"):
        iterative_top_k(jnp.ones(3), 4)
    with pytest.raises(ValueError, match="16,777,216 at most"):
        jax.eval_shape(lambda x: iterative_top_k(x, 1), jax.ShapeDtypeStruct((2**24 + 1,), "float32"))
    with pytest.raises(TypeError, match="int32"):
        iterative_top_k(jnp.arange(3), 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows, st.sampled_from([1, 2, 8, V - 1, V, V + 9]))
def test_the_likeliest_k_are_those_of_a_sort(x_V, k):
    x_V = np.maximum(x_V, np.finfo(np.float32).min)  # of what cannot be drawn any may be in
    expected = np.isin(np.arange(V), in_order(x_V)[:k])
    np.testing.assert_array_equal(allowed(x_V, k, 1.0, False), expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(logits, st.sampled_from([None, 1, 3, 20]), st.floats(0.001, 1.0))
def test_the_likeliest_that_hold_p_are_those_of_a_sort(x_V, k, p):
    assume(np.isfinite(x_V.max()))
    order = in_order(x_V)[:k]
    weights = np.exp(x_V[order].astype(np.float64) - x_V.max())
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    assume(np.abs(before - p).min() > 1e-6)  # the border within rounding, on which either is right
    kept = order[before < p]
    found = np.asarray(allowed(x_V, k, p, True))
    drawable = x_V > -40  # less has no probability that float32 adds
    assert set(np.flatnonzero(found & drawable)) == {int(i) for i in kept if drawable[i]}


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.75])
def test_of_equal_tokens_the_first_are_in(p):
    x_V = np.zeros(16, np.float32)
    assert np.flatnonzero(allowed(x_V, None, p, True)).tolist() == list(range(math.ceil(p * 16)))


@pytest.fixture
def as_neuron():
    backends.prepare(as_backend="neuron")
    yield
    backends.prepare()


@pytest.mark.usefixtures("as_neuron")
@pytest.mark.parametrize(
    ("topology", "native_top_k"),
    [
        (None, False),
        ("inf2.48xlarge", False),
        ("trn1.32xlarge", False),
        ("trn2.48xlarge", True),
        ("trn3-gen2-ultraserver", False),
    ],
)
def test_the_chip_decides(topology, native_top_k):
    kind = None if topology is None else load_topology(topology).device_kinds[0]
    with backends.standing_for(kind):
        text = str(jax.make_jaxpr(lambda x: choose_top_k(x, 2))(jnp.ones((4, 8))))
        problem = top_k_problem(MOST_ROUNDS + 1, backends.current())
    assert ("top_k" in text) == native_top_k
    assert (problem is None) == native_top_k
    assert not {"sort", "argmax"} & set(text.replace("[", " ").split())


@pytest.mark.usefixtures("as_neuron")
@pytest.mark.parametrize(("top_k", "top_p"), [(8, 0.9), (None, 0.9), (200, None)])
def test_no_draw_asks_for_what_chips_refuse(top_k, top_p):
    text = jax.jit(functools.partial(likeliest, top_k=top_k, top_p=top_p)).lower(jnp.ones(512)).as_text()
    text += jax.jit(lambda x: iterative_top_k(x, top_k if top_k == 8 else 4)).lower(jnp.ones((3, 512))).as_text()
    assert not [op for op in ("stablehlo.sort", "top_k", "stablehlo.while", "scatter") if op in text]


def test_the_cpu_and_gpu_keep_their_own():
    assert backends.current().top_k == "native"
    assert "top_k" in str(jax.make_jaxpr(lambda x: choose_top_k(x, 2))(jnp.ones(8)))
