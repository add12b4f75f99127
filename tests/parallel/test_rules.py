from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from trainfw import UserError
from trainfw.parallel import Layout, Rules, constrain, gather_weight, make_mesh, use_rules


def rules(overrides=None, **sizes: int) -> Rules:
    layout = Layout(**sizes)
    count = 1
    for size in sizes.values():
        count *= size
    return Rules(make_mesh(layout, jax.devices()[:count]), overrides)


def test_names_become_axes_and_axes_of_one_are_left_out():
    assert rules(fsdp=2, tensor=4).spec("w", (8, 16), ("embed", "mlp")) == P(("fsdp",), ("tensor",))
    assert rules(fsdp=2).spec("w", (8, 16), ("embed", "mlp")) == P(("fsdp",), None)
    assert rules(data=2, fsdp=4).spec("x", (8, 3), ("batch", None)) == P(("data", "fsdp"), None)


def test_a_weight_is_gathered_over_fsdp_only():
    assert rules(fsdp=2, tensor=2).spec("w", (8, 16), ("embed", "mlp"), without="fsdp") == P(None, ("tensor",))


def test_what_cannot_be_sharded_is_named():
    with pytest.raises(
        UserError, match=r"layers\.mlp: dim 1 \('mlp', size 6\) does not divide over .*tensor\(4\) = 4; .*: 2, 3$"
    ):
        rules(tensor=4).spec("layers.mlp", (8, 6), ("embed", "mlp"))
    with pytest.raises(UserError, match="w: dims 'heads' and 'mlp' are both sharded over mesh axis 'tensor'"):
        rules(tensor=2).spec("w", (8, 8), ("heads", "mlp"))
    with pytest.raises(UserError, match="unknown dim name 'mpl'; did you mean 'mlp'"):
        rules(tensor=2).spec("w", (8, 8), ("embed", "mpl"))
    with pytest.raises(UserError, match="has 2 dims"):
        rules().spec("w", (8, 8), ("embed",))


def test_rules_can_be_replaced():
    assert rules({"embed": ["tensor"], "mlp": []}, tensor=2).spec("w", (8, 8), ("embed", "mlp")) == P(("tensor",), None)


def test_the_gradient_of_a_gathered_weight_is_sharded_again():
    mesh_rules = rules(fsdp=4)
    weight = jax.device_put(jnp.ones((8, 8)), mesh_rules.sharding("w", (8, 8), ("embed", "mlp")))
    with use_rules(mesh_rules):
        grad = jax.jit(jax.grad(lambda w: (gather_weight(w, "w", "embed", "mlp") ** 2).sum()))(weight)
    assert grad.sharding.spec == P("fsdp", None)
    assert (grad == 2).all()


def test_activations_follow_the_rules_in_use_and_none_outside():
    def f(x):
        return constrain(x * 2, "x", "batch", "act_mlp"), gather_weight(x * 3, "w", "embed", "mlp")

    x = jnp.ones((8, 8))
    assert len(jax.jit(f)(x)[0].sharding.device_set) == 1
    mesh_rules = rules(fsdp=2, tensor=4)
    with use_rules(mesh_rules):
        activation, weight = jax.jit(f)(jax.device_put(x, mesh_rules.replicated))
    assert activation.sharding.spec == P("fsdp", "tensor")
    assert weight.sharding.spec == P(None, "tensor")
