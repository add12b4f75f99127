from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from trainfw.models.common.layers import RMSNorm, gate_with
from trainfw.parallel import Layout, Rules, make_mesh, use_rules


def test_a_norm_over_a_dim_that_is_split_is_that_of_the_whole():
    norm = RMSNorm(12, eps=1e-5, axis="heads")
    graphdef, _ = nnx.split(norm)
    scale, x, probe = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(12,), (3, 12), (3, 12)]))

    def gradients(scale, x, probe):
        def loss(scale, x):
            return jnp.sum(nnx.merge(graphdef, nnx.State({"scale": scale}))(x) * probe)

        return jax.value_and_grad(loss, argnums=(0, 1))(scale, x)

    expected, expected_grads = gradients(scale, x, probe)
    rules = Rules(make_mesh(Layout(tensor=4), jax.devices()[:4]))
    with use_rules(rules):
        specs = (P("tensor"), P(None, "tensor"), P(None, "tensor"))

        def step(*args):
            value, grads = gradients(*args)
            return jax.lax.psum(value, "tensor"), grads

        mapped = jax.shard_map(step, mesh=rules.mesh, in_specs=specs, out_specs=(P(), specs[:2]), check_vma=False)
        value, grads = jax.jit(mapped)(scale, x, probe)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, right in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_gate_in_bfloat16_is_rounded_once(activation):
    gate, up, cotangent = (jax.random.normal(jax.random.key(n), (16, 8), jnp.bfloat16) for n in range(3))

    def exact(gate, up):
        active = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return active * up

    y, back = jax.vjp(lambda *inputs: gate_with(activation, *inputs), gate, up)
    wide, wide_back = jax.vjp(exact, *(x.astype(jnp.float32) for x in (gate, up)))
    for found, expected in zip((y, *back(cotangent)), (wide, *wide_back(cotangent.astype(jnp.float32)))):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(found), expected, rtol=2**-8, atol=1e-6)
