from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw import check
from trainfw.sampling import Draws, draw_tokens

LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))
COUNT, ROWS = 4000, 40


def settings_of(count=ROWS, temperature=1.0, top_k=0, top_p=1.0, allowed=2**32 - 1, seed=0, vocabulary=5):
    """Of draws number 0, 1, 2 ... of one answer."""

    def each(value, dtype):
        return jnp.full(count, value, dtype)

    numbers, words = jnp.arange(count, dtype=jnp.int32), -(-vocabulary // 32)
    of_rows = (each(temperature, "float32"), each(seed, "uint32"), numbers, each(top_k, "int32"))
    return Draws(*of_rows, each(top_p, "float32"), jnp.full((count, words), allowed, "uint32"))


draw = jax.jit(lambda logits_V, draws: draw_tokens(jnp.broadcast_to(logits_V, (ROWS, logits_V.size)), draws))


def drawn(**options):
    draws = settings_of(**options)
    of_all = (replace(draws, count_B=draws.count_B + start) for start in range(0, COUNT, ROWS))
    return np.concatenate([draw(LOGITS, some).token_B for some in of_all])


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first():
    assert set(drawn(temperature=0)) == {1}
    equal_BV = jnp.array([[0.0, 3.0, 1.0, 3.0]])
    assert draw_tokens(equal_BV, None).token_B.tolist() == [1]
    assert draw_tokens(equal_BV, settings_of(1, 0.0, vocabulary=4)).token_B.tolist() == [1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    frequencies = np.bincount(drawn(temperature=temperature), minlength=5) / COUNT
    np.testing.assert_allclose(frequencies, jax.nn.softmax(LOGITS / temperature), atol=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"allowed": 0b10101}, {0, 2, 4}),
        ({"allowed": 0b10101, "top_k": 1}, {4}),
        ({"allowed": 0b00101, "temperature": 0.0}, {0}),
    ],
)
def test_truncation_keeps_the_likeliest_of_what_is_allowed(options, kept):
    assert set(drawn(**options)) == kept


def test_logarithms_are_the_models_own():
    found = draw(LOGITS, settings_of(temperature=0.3, top_k=2))
    np.testing.assert_allclose(found.logprob_B, LOGITS[found.token_B], atol=1e-6)
    assert found.likeliest_BN[0].tolist() == [1, 3, 4, 0, 2]
    np.testing.assert_allclose(found.likeliest_logprob_BN[0], LOGITS[found.likeliest_BN[0]], atol=1e-6)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.integers(1, 3), st.floats(0.01, 1), st.floats(0.01, 5))
def test_a_draw_is_always_a_token_that_truncation_keeps(logits, top_k, top_p, temperature):
    token = int(draw_tokens(jnp.array([logits]), settings_of(1, temperature, top_k, top_p)).token_B[0])
    assert sorted(logits, reverse=True).index(pytest.approx(logits[token])) < top_k


def test_a_draw_is_clean():
    shapes = jax.eval_shape(lambda: (jnp.zeros((3, 512)), settings_of(3, vocabulary=512)))
    report = check(draw_tokens, *shapes, hardware="trn2.3xlarge")
    assert [str(finding) for finding in report.findings if finding.severity != "note"] == []
