from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainfw import RunError
from trainfw.checkpoint import CheckpointConfig, Checkpoints
from trainfw.parallel import Layout, make_mesh


def sharded(count: int, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(make_mesh(Layout(fsdp=count), jax.devices()[:count]), spec)


def abstract(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.fixture
def saved(tmp_path):
    params = {"a": {"kernel": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharded(8, PartitionSpec("fsdp")))}}
    rest = {"step": jnp.int32(3), "rng": jnp.arange(2, dtype=jnp.uint32)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, params, rest, {"data": {"next_row": 24}})
    checkpoints.close()
    return tmp_path, params, rest


def test_restores_onto_another_mesh(saved):
    directory, params, rest = saved
    checkpoints = Checkpoints(directory, CheckpointConfig(), read_only=True)
    two = sharded(2, PartitionSpec(None, "fsdp"))
    restored, _, meta = checkpoints.restore(3, abstract(params, two), abstract(rest, sharded(2, PartitionSpec())))
    assert restored["a"]["kernel"].sharding == two
    np.testing.assert_array_equal(restored["a"]["kernel"], params["a"]["kernel"])
    assert meta == {"data": {"next_row": 24}}
    assert checkpoints.latest == 3


def test_parameters_alone(saved):
    directory, params, _ = saved
    checkpoints = Checkpoints(directory, CheckpointConfig(), read_only=True)
    restored = checkpoints.restore_params(3, abstract(params, sharded(1, PartitionSpec())))
    np.testing.assert_array_equal(restored["a"]["kernel"], params["a"]["kernel"])


def test_a_damaged_checkpoint_is_a_run_error_that_names_it(saved):
    directory, params, _ = saved
    for file in (directory / "3" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    checkpoints = Checkpoints(directory, CheckpointConfig(), read_only=True)
    with pytest.raises(RunError, match="step 3 cannot be restored"):
        checkpoints.restore_params(3, abstract(params, sharded(1, PartitionSpec())))
