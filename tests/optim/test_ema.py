"""The average of what learns, by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.optim import OptimizerConfig, average_of, make_optimizer


def averaged(decay, steps):
    """Average by a loop in float64, as Diffusers' `EMAModel.get_decay` and `step` write it down."""
    average = None
    for n, params in enumerate(steps):
        now = min(decay, (1 + n) / (10 + n)) if n else 0.0
        average = params if average is None else now * average + (1 - now) * params.astype(np.float64)
    return average


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.floats(1e-3, 1 - 1e-6),
    st.lists(st.sampled_from([-1.0, 0.0, 1e-3, 2.0]), min_size=1, max_size=8),
)
def test_the_average_is_that_of_a_loop_and_changes_no_update(decay, scales):
    config = {"name": "lion", "schedule": "constant", "learning_rate": 0.1}
    plain, ours = (make_optimizer(OptimizerConfig(**config, ema=ema), 10) for ema in (None, decay))
    noise = jax.random.normal(jax.random.key(0), (3, 8, 6))
    params = {"layers": {"up": {"kernel": noise}}, "final": {"scale": noise[0, 0]}}
    states, history = [plain.init(params), ours.init(params)], []
    np.testing.assert_array_equal(average_of(states[1])["final"]["scale"], noise[0, 0])
    for scale in scales:
        grads = jax.tree.map(lambda x, s=scale: s * jnp.sin(x), params)
        expected, states[0] = plain.update(grads, states[0], params)
        updates, states[1] = ours.update(grads, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(params)
    assert average_of(states[0]) is None
    found = jax.tree.leaves(average_of(states[1]))
    for leaf, *steps in zip(found, *map(jax.tree.leaves, history), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, averaged(decay, map(np.asarray, steps)), rtol=2e-6, atol=1e-7)
