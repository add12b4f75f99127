from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainfw.hlo import collectives_of, partition
from trainfw.parallel import Layout, make_mesh, reorder_layers, stage_order
from trainfw.parallel.pipeline import _mover

ORDER = stage_order(8, 2, 2)


def tree(spec):
    sharding = NamedSharding(make_mesh(Layout(pipeline=2, fsdp=4), jax.devices()), spec)
    kernel = jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)
    return {"mu": {"layers": {"kernel": kernel, "scalar": jnp.float32(3)}, "head": jnp.arange(8)}}


@pytest.mark.parametrize(
    "spec", [PartitionSpec(), PartitionSpec("pipeline"), PartitionSpec("pipeline", "fsdp"), PartitionSpec(None, "fsdp")]
)
def test_layers_move_and_nothing_else(spec):
    held = tree(spec)
    moved = reorder_layers(held, range(8), ORDER)
    np.testing.assert_array_equal(
        moved["mu"]["layers"]["kernel"], np.asarray(held["mu"]["layers"]["kernel"])[list(ORDER)]
    )
    assert moved["mu"]["layers"]["kernel"].sharding == held["mu"]["layers"]["kernel"].sharding
    np.testing.assert_array_equal(moved["mu"]["head"], held["mu"]["head"])
    back = reorder_layers(moved, ORDER, range(8), donate=True)
    jax.tree.map(np.testing.assert_array_equal, back, held)
    assert moved["mu"]["layers"]["kernel"].is_deleted()


def test_one_order_to_another():
    other = stage_order(8, 4, 2)
    held = reorder_layers(tree(PartitionSpec()), range(8), ORDER)
    moved = reorder_layers(held, ORDER, other)
    jax.tree.map(np.testing.assert_array_equal, moved, reorder_layers(tree(PartitionSpec()), range(8), other))


def test_stages_gather_and_never_permute():
    kernel = tree(PartitionSpec("pipeline", "fsdp"))["mu"]["layers"]["kernel"]
    found = collectives_of(partition(_mover(ORDER, kernel.sharding, False).lower(kernel)).module)
    assert [(c.kind, c.group_size) for c in found] == [("all-gather", 2)]
