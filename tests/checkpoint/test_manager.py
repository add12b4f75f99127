from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import tiny_recipe
from trainfw import RunError, build_program
from trainfw.checkpoint import CheckpointConfig, Checkpoints
from trainfw.parallel import Layout, make_mesh, reorder_layers


def sharded(count: int, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(make_mesh(Layout(fsdp=count), jax.devices()[:count]), spec)


def abstract(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.fixture
def saved(tmp_path):
    params = {"a": {"kernel": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharded(8, PartitionSpec("fsdp")))}}
    rest = {"step": jnp.int32(3), "rng": jnp.arange(2, dtype=jnp.uint32)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, params, rest, {"data": {"next_row": 24, "order": "a"}})
    checkpoints.close()
    return tmp_path, params, rest


def test_restores_onto_another_mesh(saved):
    directory, params, rest = saved
    checkpoints = Checkpoints(directory, CheckpointConfig(), read_only=True)
    two = sharded(2, PartitionSpec(None, "fsdp"))
    restored, _, meta = checkpoints.restore(3, abstract(params, two), abstract(rest, sharded(2, PartitionSpec())))
    assert restored["a"]["kernel"].sharding == two
    np.testing.assert_array_equal(restored["a"]["kernel"], params["a"]["kernel"])
    assert meta == {"data": {"next_row": 24, "order": "a"}}
    assert max(checkpoints.steps()) == 3


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
    with pytest.raises(RunError, match=r"the checkpoint of step 3 is damaged: .* has 0 bytes"):
        checkpoints.restore_params(3, abstract(params, sharded(1, PartitionSpec())))


def saved_in(directory, order, optimizer="adamw"):
    recipe = tiny_recipe(directory, "model.num_layers=4", f"optimizer.name={optimizer}")
    abstract = build_program(recipe, jax.devices()[:2]).abstract_state
    state = jax.tree.map(
        lambda x: jax.device_put(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), x.sharding), abstract
    )
    held = reorder_layers((state.params, state.opt_state), range(4), order or range(4))
    checkpoints = Checkpoints(directory / "run", CheckpointConfig(), layer_order=order)
    checkpoints.save(1, held[0], {"opt_state": held[1]}, {"held_out": "a"})
    checkpoints.close()
    return abstract, (state.params, state.opt_state)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_layers_saved_in_one_order_are_restored_in_another(optimizer, tmp_path):
    abstract, expected = saved_in(tmp_path, (0, 2, 1, 3), optimizer)
    for order in (None, (0, 2, 1, 3), (2, 0, 3, 1)):
        checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), layer_order=order, read_only=True)
        params, rest, meta = checkpoints.restore(1, abstract.params, {"opt_state": abstract.opt_state})
        wanted = reorder_layers(expected, range(4), order or range(4))
        jax.tree.map(np.testing.assert_array_equal, (params, rest["opt_state"]), wanted)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(1, abstract.params), wanted[0])
        assert meta == {"held_out": "a"}
    kernels = [leaf for leaf in jax.tree.leaves(wanted[1]) if leaf.shape[:1] == (4,) and leaf.any()]
    assert kernels  # state of layers was moved, too


def test_checkpoints_without_an_order_are_in_the_true_one(tmp_path):
    abstract, expected = saved_in(tmp_path, None)
    assert "layer_order" not in (tmp_path / "run" / "1" / "meta" / "metadata").read_text()
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), layer_order=(2, 0, 3, 1), read_only=True)
    restored = checkpoints.restore_params(1, abstract.params)
    jax.tree.map(np.testing.assert_array_equal, restored, reorder_layers(expected[0], range(4), (2, 0, 3, 1)))
