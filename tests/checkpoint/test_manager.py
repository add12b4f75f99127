from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import tiny_recipe
from trainfw import RunError, build_program
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


def test_restores_what_fsdp_shards_otherwise(tmp_path):
    def program(shards: str):
        return build_program(tiny_recipe(tmp_path, f"parallel.fsdp_shards={shards}"), jax.devices()[:4])

    state, other = program("parameters").init(), program("optimizer").abstract_state
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state.params, {"opt_state": state.opt_state}, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), read_only=True)
    params, rest, _ = checkpoints.restore(1, other.params, {"opt_state": other.opt_state})
    table, moment = params["embedding"]["table"], jax.tree.leaves(rest["opt_state"])[1]
    assert table.sharding == other.params["embedding"]["table"].sharding != state.params["embedding"]["table"].sharding
    assert moment.sharding == jax.tree.leaves(other.opt_state)[1].sharding
    np.testing.assert_array_equal(table, state.params["embedding"]["table"])


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
