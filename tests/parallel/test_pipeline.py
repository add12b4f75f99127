from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from pydantic import ValidationError

from tests.helpers import quicker
from trainfw.hardware import load_topology
from trainfw.hlo import collectives_of, partition
from trainfw.parallel import (
    Layout,
    ParallelConfig,
    Rules,
    all_gather,
    bubble,
    chunk_of,
    layers_problem,
    make_mesh,
    permute_problem,
    pipelined,
    stage_order,
    use_rules,
)

B, S, D = 2, 3, 4
LAYERS_OF_A_CHUNK = 2


def layer(w_DD, x_BSD, positions_BS):
    # The norm has no finite gradient at zero: an idle stage must not run on zeros.
    y_BSD = x_BSD / jnp.sqrt(jnp.sum(x_BSD**2, -1, keepdims=True))
    return x_BSD + 0.3 * jnp.tanh(y_BSD @ w_DD + jnp.sin(positions_BS)[..., None])


def layers(ws_LDD, x_BSD, positions_BS):
    def step(x_BSD, w_DD):
        x_BSD = layer(w_DD, x_BSD, positions_BS)
        return x_BSD, {"size": jnp.sum(x_BSD**2)}

    return jax.lax.scan(step, x_BSD, ws_LDD)


def problem(stages, count, chunks, rows=1):
    rng = np.random.default_rng(stages * 100 + count * 10 + chunks)
    num_layers = LAYERS_OF_A_CHUNK * stages * chunks
    ws = rng.normal(size=(num_layers, D, D)).astype(np.float32) * 0.5
    x = rng.normal(size=(count, stages * rows * B, S, D)).astype(np.float32)
    positions = rng.integers(0, 9, x.shape[:-1]).astype(np.int32)
    weights = rng.normal(size=x.shape).astype(np.float32), rng.normal(size=num_layers).astype(np.float32)
    return ws, x, positions, weights


def sequential(ws, x, positions, weights):
    """(objective, (outputs, sizes of each layer summed over microbatches)) on one device."""

    def one(microbatch):
        return layers(ws, *microbatch)

    y, outs = jax.lax.map(one, (x, positions))
    sizes = outs["size"].sum(0)
    return jnp.sum(y * weights[0]) + jnp.sum(sizes * weights[1]), (y, sizes)


def on_stages(stages, chunks, *, fsdp=1, remat=False):
    """The same on a mesh; parameters and the sizes in the order of the stages."""
    rules = Rules(make_mesh(Layout(pipeline=stages, fsdp=fsdp), jax.devices()[: stages * fsdp]))

    def local(ws, x, positions, weights):
        def stage(chunk, x, positions):
            own = chunk_of(ws, chunk, chunks)
            return layers(all_gather(own, "fsdp", 1), x, positions)

        y, outs = pipelined(stage, x, positions, chunks=chunks, remat=remat)
        sizes = outs["size"].reshape(-1)
        return jnp.sum(y * weights[0]) + jnp.sum(sizes * weights[1]), (y, sizes)

    def mapped(ws, x, positions, weights):
        with use_rules(rules):
            (_, aux), grads = jax.value_and_grad(local, argnums=(0, 1), has_aux=True)(ws, x, positions, weights)
        return grads, aux[0], aux[1][:, None]

    rows, stacked = PartitionSpec(None, ("pipeline", "fsdp")), PartitionSpec("pipeline", "fsdp")

    def run(ws, x, positions, weights):
        (dw, dx), y, sizes = jax.shard_map(
            mapped,
            mesh=rules.mesh,
            in_specs=(stacked, rows, rows, (rows, PartitionSpec("pipeline"))),
            out_specs=((stacked, rows), rows, stacked),
            check_vma=False,
        )(ws, x, positions, weights)
        return dw, dx, y, sizes.sum(1)

    return jax.jit(run)


def close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def check(stages, count, chunks, **options):
    ws, x, positions, weights = problem(stages, count, chunks, options.get("fsdp", 1))
    order = np.asarray(stage_order(len(ws), stages, chunks))
    (_, (y, sizes)), (dw, dx) = jax.jit(jax.value_and_grad(sequential, argnums=(0, 1), has_aux=True))(
        ws, x, positions, weights
    )
    got = on_stages(stages, chunks, **options)(ws[order], x, positions, (weights[0], weights[1][order]))
    for actual, expected in zip(got, (dw[order], dx, y, sizes[order]), strict=True):
        close(actual, expected)


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_stages_compute_what_one_device_does(stages, count, chunks, remat):
    check(stages, count, chunks, remat=remat)


SCHEDULES = list(itertools.product((1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 3)))


@pytest.mark.parametrize("schedule", quicker(SCHEDULES, SCHEDULES[::4]), ids=str)
def test_every_schedule(schedule):
    stages, count, chunks = schedule
    check(stages, count, chunks, remat=chunks == 2)


def test_eight_stages():
    check(8, 2, 2)


def test_gathers_of_weights_inside_stages():
    check(2, 2, 2, fsdp=4, remat=True)


def collectives(stages, count, chunks):
    ws, x, positions, weights = problem(stages, count, chunks)
    module = partition(on_stages(stages, chunks).lower(ws, x, positions, weights)).module
    return collectives_of(module)


def test_only_full_circles_of_one_microbatch():
    stages, count, chunks = 4, 2, 2
    iterations = count * stages * chunks + stages - 1
    found = collectives(stages, count, chunks)
    assert {c.kind for c in found} == {"collective-permute"}
    topology = load_topology("trn2.48xlarge")
    for collective in found:
        assert len(collective.pairs) == stages
        assert permute_problem(topology, collective.pairs) is None
        assert collective.bytes in (B * S * D * 4, B * S * 4)
    activations = sum(c.times for c in found if c.bytes == B * S * D * 4)
    # Two forward and two backward; what ends the loops may be left out where it is not used.
    assert 4 * (iterations - 1) <= activations <= 4 * (iterations + 1)


def test_one_stage_has_no_collectives():
    assert collectives(1, 2, 2) == []


def test_idle_iterations():
    assert bubble(1, 8) == 0
    assert bubble(4, 8) == 3 / 11
    assert bubble(4, 8, 2) == 3 / 19


def test_stages_hold_every_nth_chunk():
    assert stage_order(8, 2, 1) == tuple(range(8))
    assert stage_order(7, 1, 4) == tuple(range(7))
    assert stage_order(8, 2, 2) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert stage_order(6, 2, 3) == (0, 2, 4, 1, 3, 5)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_an_order_is_a_permutation(stages, chunks, size):
    order = stage_order(stages * chunks * size, stages, chunks)
    assert sorted(order) == list(range(len(order)))
    for stage in range(stages):
        own = order[stage * chunks * size : (stage + 1) * chunks * size]
        assert {layer // size % stages for layer in own} == {stage}


def test_layers_that_do_not_divide():
    assert layers_problem(126, 1, 1) == ""
    assert layers_problem(126, 7, 2) == ""
    assert layers_problem(24, 2, 2, period=6) == ""
    assert "pipeline(8); the nearest numbers of stages that do: 7, 9" in layers_problem(126, 8, 1)
    assert "pipeline(4) * interleave(2) = 8; the nearest products that do: 7, 9" in layers_problem(126, 4, 2)
    assert "in whole periods of 2 layers; the nearest numbers of stages that do: 3, 7" in layers_problem(42, 6, 1, 2)
    assert "62 layers are no whole number of periods of 6" in layers_problem(62, 2, 1, 6)
    assert layers_problem(2, 4, 1).endswith("that do: 2")


def test_interleaving_needs_stages():
    assert ParallelConfig(pipeline=2, interleave=3).interleave == 3
    with pytest.raises(ValidationError, match="more than one stage"):
        ParallelConfig(interleave=2)
