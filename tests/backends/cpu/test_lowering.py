"""What `jax.checkpoint` saves: float32 and bfloat16 are left as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from trainfw.backends import select


def lowered(dtype) -> str:
    """The gradient of a function that saves an array of `dtype`, as it goes to XLA."""

    def function(x):
        return jnp.sum(jnp.sin(checkpoint_name(jnp.sin(x), "kept")))

    policy = jax.checkpoint_policies.save_only_these_names("kept")
    text = jax.jit(jax.grad(jax.checkpoint(function, policy=policy))).lower(jnp.ones(3, dtype)).as_text()
    assert "optimization_barrier" in text  # it did save something
    return text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_they_are_saved_as_they_are(dtype):
    select.current()
    assert "reduce_precision" not in lowered(dtype)


def test_other_numbers_are_rounded_as_jax_has_it():
    select.current()
    assert "reduce_precision" in lowered(jnp.float16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_so_are_all_where_the_cpu_stands_for_another_backend(monkeypatch, dtype):
    select.current()
    monkeypatch.setattr(select, "_as_backend", "neuron")
    assert "reduce_precision" in lowered(dtype)


@pytest.mark.parametrize("mantissa_bits", [7, 22])
def test_rounding_that_was_asked_for_is_done(mantissa_bits):
    select.current()
    x = jnp.float32(1 + 2**-23)
    assert jax.jit(lambda x: jax.lax.reduce_precision(x, 8, mantissa_bits))(x) == 1
