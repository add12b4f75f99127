from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec as P

from trainfw import UserError
from trainfw.parallel import Layout, Rules, make_mesh


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


def test_a_weight_is_gathered_over_what_only_keeps_it_split():
    assert rules(fsdp=2, tensor=2).spec("w", (8, 16), ("embed", "mlp"), in_use=True) == P(None, ("tensor",))
    of_experts = rules(fsdp=2, expert=2, tensor=2).spec(
        "w", (8, 8, 16), ("experts", "expert_embed", "mlp"), in_use=True
    )
    assert of_experts == P(("expert",), None, ("tensor",))


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
    assert rules({"embed": ["data"]}, data=2, fsdp=2).spec("w", (8, 8), ("embed", "mlp")) == P(("data",), None)
    assert not rules({"embed": [], "expert_embed": []}, fsdp=2).gathers
    with pytest.raises(UserError, match=r"mlp = .*: this dim is always split over tensor; rules can be given for"):
        rules({"mlp": []})


def test_a_family_declares_dim_names_of_its_own():
    mesh = make_mesh(Layout(fsdp=2, tensor=2), jax.devices()[:4])
    own = {"memory": ("fsdp",)}
    assert Rules(mesh, own=own).spec("w", (8, 16), ("memory", "mlp")) == P(("fsdp",), ("tensor",))
    assert Rules(mesh, own=own).gathered("memory") == ("fsdp",)
    assert Rules(mesh, {"memory": []}, own=own).spec("w", (8, 16), ("memory", "mlp")) == P(None, ("tensor",))
    with pytest.raises(UserError, match="memroy: unknown dim name; did you mean 'memory'"):
        Rules(mesh, {"memroy": []}, own=own)
    with pytest.raises(UserError, match="embed: a family declares this dim name"):
        Rules(mesh, own={"embed": ()})
