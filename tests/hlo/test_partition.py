"""What the partitioner leaves, on the 8 simulated devices."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trainfw.hlo import Place, collectives_of, partition

LAYERS, ROWS, WIDTH, HIDDEN = 3, 16, 64, 256


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def abstract(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))


def test_collectives_of_a_scanned_model(mesh):
    def layer(x, weights):
        h = jax.nn.relu(x @ weights[0])
        h = jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P("data", "tensor")))
        y = h @ weights[1]  # summed over tensor
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("data", None))), None

    lowered = jax.jit(lambda x, a, b: jax.lax.scan(layer, x, (a, b))[0]).lower(
        abstract(mesh, (ROWS, WIDTH), "data", None),
        abstract(mesh, (LAYERS, WIDTH, HIDDEN), None, "data", "tensor"),
        abstract(mesh, (LAYERS, HIDDEN, WIDTH), None, "tensor", "data"),
    )
    partitioned = partition(lowered)
    assert partitioned.module.num_partitions == 8
    assert partitioned.compiled.memory_analysis().temp_size_in_bytes > 0
    found = collectives_of(partitioned.module)
    weights = WIDTH * HIDDEN // 4 * 2
    assert sorted((c.kind, c.dtype, c.bytes, c.times, c.axes(mesh), c.group_size) for c in found) == [
        ("all-gather", "bf16", weights, LAYERS, ("data",), 2),
        ("all-gather", "bf16", weights, LAYERS, ("data",), 2),
        ("all-reduce", "bf16", ROWS // 2 * WIDTH * 2, LAYERS, ("tensor",), 4),
    ]
    reduce = next(c for c in found if c.kind == "all-reduce")
    assert reduce.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# summed over" in text)
    assert reduce.instruction.place == Place(__file__, line)


def test_collectives_that_a_program_names(mesh):
    def exchange(x):
        x = jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])
        x = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return jax.lax.psum_scatter(x, "tensor", tiled=True)

    spec = P(("data", "tensor"))
    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    lowered = jax.jit(mapped).lower(abstract(mesh, (64, 8), ("data", "tensor")))
    found = {c.kind: c for c in collectives_of(partition(lowered).module)}
    block = 64 // 8 * 8 * 2
    assert {kind: (c.bytes, c.axes(mesh), c.group_size) for kind, c in found.items()} == {
        "collective-permute": (block, ("tensor",), 4),
        "all-to-all": (block, ("data",), 2),
        "reduce-scatter": (block, ("tensor",), 4),
    }
    assert (0, 1) in found["collective-permute"].pairs


def test_gradients_of_sharded_weights_are_scattered(mesh):
    everywhere = ("data", "tensor")

    def gradient(w, x, spec):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        grad = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)
        return jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, spec))

    arguments = abstract(mesh, (WIDTH, HIDDEN), everywhere), abstract(mesh, (ROWS, WIDTH), everywhere)
    for spec, scattered in ((P(everywhere), True), (P(), False)):
        lowered = jax.jit(lambda w, x, spec=spec: gradient(w, x, spec)).lower(*arguments)
        (reduce,) = (c for c in collectives_of(partition(lowered).module) if c.kind == "all-reduce")
        assert reduce.axes(mesh) == everywhere
        assert reduce.scattered == scattered


def test_one_device_has_no_collectives():
    partitioned = partition(jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((4, 4))))
    assert partitioned.module.num_partitions == 1
    assert collectives_of(partitioned.module) == []
    assert any(i.opcode == "dot" for i, _ in partitioned.module.instructions())


def test_the_compilation_cache_is_left_alone(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        lowered = jax.jit(lambda x: jnp.cos(x) * 3).lower(jax.ShapeDtypeStruct((5,), jnp.float32))
        for _ in range(2):  # a hit would leave no module to read
            assert partition(lowered).module.entry
        assert not list(tmp_path.iterdir())
        assert jax.config.values["jax_enable_compilation_cache"]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_calls_of_a_program_for_one_device_are_inlined():
    inner = jax.jit(lambda x: jnp.where(x > 0, x, 0.0).sum())
    lowered = jax.jit(jax.grad(lambda x: inner(x @ x))).lower(jax.ShapeDtypeStruct((8, 8), jnp.bfloat16))
    module = partition(lowered).module
    opcodes = [instruction.opcode for instruction, _ in module.instructions()]
    assert "call" not in opcodes
    assert "dot" in opcodes
    named = {i.op_name for i, _ in module.instructions() if i.opcode in ("select", "dot")}
    assert all("jvp(" in name for name in named)  # whole paths, by which forward and backward are told
    assert any("transpose(" in name for name in named)
    assert {i.shapes[0].dtype for i, _ in module.instructions() if i.opcode == "dot"} == {"bf16"}  # not widened yet
