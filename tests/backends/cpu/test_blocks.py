"""Attention by blocks of queries, against attention that holds all scores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.backends.cpu.blocks import blocked_attend, blocks_of
from trainfw.backends.select import CPU
from trainfw.models.common.attention import attend
from trainfw.parallel import causal_mask

B = 2


def results(run, dtype, S, K, G, softcap, window, lengths):
    """The result and the gradients of all inputs, in float32, of queries that see earlier keys."""
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None, :S].repeat(B, 0))
    mask = causal_mask(jnp.arange(S), jnp.arange(S), segments, segments, window)
    return of_mask(run, dtype, S, S, K, G, softcap, mask)


def of_mask(run, dtype, S, T, K, G, softcap, mask):
    h, keys = 8, jax.random.split(jax.random.key(S), 4)
    q, do = (jax.random.normal(key, (B, S, K * G, h), dtype) for key in (keys[0], keys[3]))
    k, v = (jax.random.normal(key, (B, T, K, h), dtype) for key in keys[1:3])

    def run_all(q, k, v):
        o, back = jax.vjp(lambda *x: run(*x, mask, scale=0.3, softcap=softcap), q, k, v)
        return o, *back(do)

    return [np.asarray(x, np.float32) for x in jax.jit(run_all)(q, k, v)]


@settings(max_examples=6, deadline=None)
@given(
    S=st.integers(1, 300),
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    softcap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 7, 200]),
    cuts=st.lists(st.integers(1, 299), max_size=3),
)
def test_it_is_attention(S, K, G, softcap, window, cuts):
    places = sorted({0, S, *(c for c in cuts if c < S)})
    lengths = [b - a for a, b in itertools.pairwise(places)]
    for ours, theirs in zip(
        results(blocked_attend, "float32", S, K, G, softcap, window, lengths),
        results(attend, "float32", S, K, G, softcap, window, lengths),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(
    S=st.integers(1, 300), T=st.integers(1, 300), K=st.integers(1, 3), G=st.integers(1, 2), seed=st.none() | st.just(0)
)
def test_it_is_attention_to_all_keys_or_those_of_a_mask(S, T, K, G, seed):
    mask = None if seed is None else jax.random.bernoulli(jax.random.key(seed), 0.5, (B, S, T)).at[..., 0].set(True)
    run = functools.partial(blocked_attend, causal=False)
    for ours, theirs in zip(
        of_mask(run, "float32", S, T, K, G, None, mask), of_mask(attend, "float32", S, T, K, G, None, mask), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_the_truth():
    arguments = (200, 2, 2, None, None, [120, 80])
    truth = results(attend, "float32", *arguments)
    ours, theirs = (results(run, "bfloat16", *arguments) for run in (blocked_attend, attend))
    for exact, a, b in zip(truth, ours, theirs, strict=True):
        assert np.abs(a - exact).max() <= 1.5 * np.abs(b - exact).max()


@pytest.mark.parametrize("queries", [1, 128, 129, 2048, 2049, 100_000])
def test_blocks_are_few_and_cover_all_queries(queries):
    blocks = blocks_of(queries)
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
    assert blocks[0][0] == 0
    assert blocks[-1][1] == queries
    assert len(blocks) <= 16


def test_no_array_has_all_scores():
    S = 1024
    q = jax.ShapeDtypeStruct((1, S, 2, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, S, S), jnp.bool_)

    def temporaries(run):
        gradient = jax.grad(lambda q, k, v, mask: run(q, k, v, mask, scale=1.0).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(q, q, q, mask).compile(CPU.compiler_options).memory_analysis().temp_size_in_bytes

    scores = 2 * S * S * 4
    assert temporaries(attend) > 2 * scores
    assert temporaries(blocked_attend) < scores
