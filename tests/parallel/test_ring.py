"""Attention over a split sequence against one device's, which sees it whole: forward, backward, and what it costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from tests.helpers import equations, quicker
from trainfw import backends
from trainfw.hardware import load_topology
from trainfw.hlo import collectives_of, partition
from trainfw.models.common.attention import attend
from trainfw.parallel import (
    Layout,
    Rules,
    context_problem,
    gathered_attention,
    local_indices,
    make_mesh,
    permute_problem,
    ring_attention,
    use_rules,
    zigzag_order,
)

FORMS: dict[str, Callable[..., jax.Array]] = {
    "ring": ring_attention,
    "gathered": functools.partial(gathered_attention, attend=attend),
}
SCALE = 0.3
BATCH, HEAD_DIM = 2, 8


def dense(q, k, v, segment_ids, window, softcap):
    """Attention as the textbook has it."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * SCALE
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1), v)


@functools.cache
def one_device(window, softcap):
    def run(q, k, v, segment_ids, cotangent):
        out, back = jax.vjp(lambda q, k, v: dense(q, k, v, segment_ids, window, softcap), q, k, v)
        return out, *back(cotangent)

    return jax.jit(run)


@functools.cache
def split(form, layout, window=None, softcap=None, segments=True, backward=True):
    """(o, dq, dk, dv), or o alone, of whole arrays in zig-zag order."""
    mesh = make_mesh(layout, jax.devices()[: math.prod(layout.sizes.values())])

    def run(q, k, v, segment_ids, cotangent):
        with use_rules(Rules(mesh)):
            attention = functools.partial(
                FORMS[form],
                axis="context",
                indices_S=local_indices(q.shape[1]),
                segment_ids_BS=segment_ids if segments else None,
                window=window,
                scale=SCALE,
                softcap=softcap,
            )
            if not backward:
                return attention(q, k, v)
            out, back = jax.vjp(attention, q, k, v)
            return out, *back(cotangent)

    rows = PartitionSpec("data", "context")
    heads = PartitionSpec("data", "context", "tensor")
    specs = (heads, heads, heads, rows, heads)
    outs = (heads,) * 4 if backward else heads
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False))


def inputs(length, kv_heads=1, group=2, seed=0, dtype="float32"):
    """(q, k, v, segment ids, cotangent), columns in their natural order; up to four segments a row."""
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, length, heads, HEAD_DIM) for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)]
    q, k, v, cotangent = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    segment_ids = np.sort(rng.integers(0, 4, (BATCH, length))).astype(np.int32)
    return q, k, v, segment_ids, cotangent


def run_split(form, layout, arrays, **options):
    order = zigzag_order(arrays[0].shape[1], layout.context)
    found = split(form, layout, **options)(*(x[:, order] for x in arrays))
    return [x[:, np.argsort(order)] for x in found]


def agree(found, right, tolerance):
    for name, mine, theirs in zip(("o", "dq", "dk", "dv"), found, right, strict=True):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        # Of inputs around 1, gradients may cancel to exactly nothing: a token that sees itself alone.
        assert np.abs(mine - theirs).max() <= tolerance * max(np.abs(theirs).max(), 0.1), name


def check(context, chunk, kv_heads, group, window, softcap, segments, seed):
    arrays = inputs(2 * context * chunk, kv_heads, group, seed)
    q, k, v, segment_ids, cotangent = arrays
    whole = segment_ids if segments else np.zeros_like(segment_ids)
    right = one_device(window, softcap)(q, k, v, whole, cotangent)
    for form in FORMS:
        layout = Layout(context=context)
        agree(run_split(form, layout, arrays, window=window, softcap=softcap, segments=segments), right, 1e-5)


EXAMPLES = {
    "chunk": st.integers(1, 5),
    "kv_heads": st.integers(1, 2),
    "group": st.sampled_from([1, 2, 4]),
    "window": st.none() | st.integers(1, 40),
    "softcap": st.sampled_from([None, 1.5]),
    "segments": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=3, deadline=None)
@given(context=st.sampled_from([2, 4]), **EXAMPLES)
def test_it_is_full_attention(**example):
    check(**example)


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(context=st.sampled_from([1, 2, 4, 8]), **EXAMPLES)
def test_it_is_full_attention_whatever_the_size(**example):
    check(**example)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_segments_may_lie_anywhere(seed):
    check(4, 3, 2, 2, 7, 1.5, True, seed)


def test_beside_other_axes():
    arrays = inputs(16, kv_heads=2, group=2)
    right = one_device(5, None)(*arrays)
    for form in FORMS:
        agree(run_split(form, Layout(data=2, context=2, tensor=2), arrays, window=5), right, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_along_one_device_it_is_plain_attention(form):
    arrays = inputs(7)
    agree(run_split(form, Layout(), arrays, window=4), one_device(4, None)(*arrays), 1e-5)
    module = partition(split(form, Layout(), window=4).lower(*arrays)).module
    assert not collectives_of(module)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_inputs_have_narrow_products_and_results(form):
    arrays = inputs(32, dtype="bfloat16")
    found = run_split(form, Layout(context=4), arrays)
    assert {x.dtype.name for x in found} == {"bfloat16"}
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]
    agree(found, one_device(None, None)(*wide), 0.03)
    for product in products(split(form, Layout(context=4)), arrays):
        assert {x.aval.dtype.name for x in product.invars} == {"bfloat16"}


def test_in_a_rematerialised_scan_it_has_the_same_gradient():
    arrays = inputs(16)
    mesh = make_mesh(Layout(context=4), jax.devices()[:4])

    def loss(q, k, v, segment_ids, *, layer):
        form = {"indices_S": local_indices(q.shape[1]), "segment_ids_BS": segment_ids, "window": None}
        step = layer(functools.partial(ring_attention, axis="context", scale=SCALE, softcap=None, **form))
        return jax.lax.scan(lambda q, _: (step(q, k, v), None), q, None, length=2)[0].sum()

    def gradients(q, k, v, segment_ids, layer):
        with use_rules(Rules(mesh)):
            return jax.grad(functools.partial(loss, layer=layer), argnums=(0, 1, 2))(q, k, v, segment_ids)

    columns = PartitionSpec(None, "context")
    found = [
        jax.jit(
            jax.shard_map(
                functools.partial(gradients, layer=layer),
                mesh=mesh,
                in_specs=columns,
                out_specs=columns,
                check_vma=False,
            )
        )(*arrays[:4])
        for layer in (jax.checkpoint, lambda step: step)
    ]
    for again, saved in zip(*found, strict=True):
        np.testing.assert_allclose(again, saved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("context", quicker([2, 8], [2]))
def test_the_ring_permutes_in_full_circles_only(context):
    arrays = inputs(2 * context)
    whole = [(i, (i + 1) % context) for i in range(context)]
    # Keys, values, indices and segments visit everyone else; gradients of the first two also come home.
    for backward, circles in ((False, 4 * (context - 1)), (True, 8 * (context - 1) + 2 * context)):
        module = partition(split("ring", Layout(context=context), backward=backward).lower(*arrays)).module
        found = collectives_of(module)
        assert {collective.kind for collective in found} == {"collective-permute"}
        assert all(sorted(collective.pairs) == whole for collective in found)
        assert sum(collective.times for collective in found) == circles
        assert permute_problem(load_topology("trn2.48xlarge"), found[0].pairs) is None


def test_no_exchange_waits_for_the_products_beside_it():
    """Keys wait for none at all, and gradients of keys for those of earlier rounds only: they travel meanwhile."""
    context = 4
    module = partition(split("ring", Layout(context=context), segments=False).lower(*inputs(16))).module
    (computation,) = (
        c for c in module.computations.values() if any(i.opcode == "dot" for i in c.instructions.values())
    )

    @functools.cache
    def needs(name):
        instruction = computation.instructions[name]
        found = frozenset([name]) if instruction.opcode == "dot" else frozenset()
        return found.union(*(needs(operand.partition("#")[0]) for operand in instruction.operands))

    assert sum(i.opcode == "dot" for i in computation.instructions.values()) == (2 + 5) * (3 + 2 * (context - 1))
    permutes = [i.name for i in computation.instructions.values() if i.opcode == "collective-permute"]
    # The barrier before the backward pass makes all of it wait for the forward one, by name.
    forward = frozenset(
        n for n, i in computation.instructions.items() if i.opcode == "dot" and "transpose(" not in i.op_name
    )
    waits = sorted(len(needs(name) - forward) for name in permutes)
    keys, gradients = waits[: -2 * context], waits[-2 * context :]
    assert not any(keys)
    rounds = [5 * (3 + 2 * away) for away in range(context)]
    assert gradients == sorted(2 * rounds)


def test_scores_of_one_pair_of_halves_are_held_at_a_time():
    length, context = 2048, 4
    lowered = split("ring", Layout(context=context)).lower(*inputs(length, group=2))
    compiled = lowered.compile(compiler_options=dict(backends.current().compiler_options))
    scores = 4 * BATCH * 2 * (length // context // 2) ** 2
    # Their gradients, and what becomes of either; there are 3 + 3 * 2 such pairs along the way, and as many back.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * scores


def test_gathered_only_gathers_and_scatters_sums():
    arrays = inputs(32)
    for backward in (False, True):
        module = partition(split("gathered", Layout(context=4), backward=backward).lower(*arrays)).module
        kinds = {"reduce-scatter" if c.scattered else c.kind for c in collectives_of(module)}
        assert kinds == {"all-gather"} | ({"reduce-scatter"} if backward else set())


def products(function, arrays):
    jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


@pytest.mark.parametrize("context", [2, 4, 8])
def test_the_zigzag_halves_products(context):
    length, group = 8 * context, 2
    arrays = inputs(length, group=group)
    local = length // context
    block = BATCH * group * local * local  # scores of the local queries with as many keys

    def blocks(form, backward):
        found = products(split(form, Layout(context=context), backward=backward), arrays)
        sizes = [
            math.prod(p.outvars[0].aval.shape)
            * math.prod(p.invars[0].aval.shape[dim] for dim in p.params["dimension_numbers"][0][0])
            for p in found
        ]
        return sum(sizes) / (block * HEAD_DIM), found

    # Of 2 * context halves along the diagonal, and of 2 of 4 with every other device.
    ring = 3 / 4 + (context - 1) / 2
    assert blocks("ring", False)[0] == 2 * ring
    found, dots = blocks("ring", True)
    assert found == (2 + 5) * ring
    assert blocks("gathered", False)[0] == 2 * 3 / 4 * context
    # No more scores at a time than those of two halves.
    assert max(math.prod(dot.outvars[0].aval.shape) for dot in dots) <= max(block // 4, arrays[0].size // context)


@given(chunk=st.integers(1, 6), parts=st.sampled_from([1, 2, 3, 4, 8]))
def test_zigzag_order(chunk, parts):
    order = zigzag_order(2 * parts * chunk, parts)
    assert sorted(order) == list(range(2 * parts * chunk))
    if parts == 1:
        assert (np.diff(order) == 1).all()
    for c, columns in enumerate(np.split(order, parts)):
        if parts > 1:
            assert set(columns[:chunk] // chunk) == {c}
            assert set(columns[chunk:] // chunk) == {2 * parts - 1 - c}


@pytest.mark.parametrize("context", [1, 2, 8])
def test_every_device_knows_its_columns(context):
    mesh = make_mesh(Layout(context=context), jax.devices()[:context])

    def run(order):
        with use_rules(Rules(mesh)):
            return local_indices(len(order)) - order

    columns = PartitionSpec("context")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=columns, out_specs=columns, check_vma=False)
    assert not mapped(zigzag_order(48, context).astype(np.int32)).any()


@given(length=st.integers(1, 500), context=st.integers(1, 8), tensor=st.integers(1, 6))
def test_lengths_that_do_not_divide(length, context, tensor):
    def divides(length):
        return length % context == length // context % tensor == 0 and (context == 1 or length % (2 * context) == 0)

    problem = context_problem(length, context, tensor)
    assert (not problem) == divides(length)
    if problem:
        nearest = [int(n) for n in problem.rpartition(": ")[2].split(" or ")]
        assert all(map(divides, nearest))
        between = range(nearest[0] + 1, nearest[-1]) if len(nearest) > 1 else range(1, nearest[0])
        assert length in between
        assert not any(map(divides, between))


def test_the_reason_names_the_axes():
    assert context_problem(100, 4, 1) == "does not divide over 2 * context(4); the nearest lengths that do: 96 or 104"
    assert context_problem(8, 4, 4) == (
        "does not divide over 2 * context(4) and over context(4) * tensor(4); the nearest lengths that do: 16"
    )
