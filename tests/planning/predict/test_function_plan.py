"""Plans of functions that no recipe has made."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import trainfw
from tests.helpers import tiny_recipe, write_recipe
from tests.planning.analysing import analyse
from trainfw import UserError
from trainfw.hardware import load_topology

CHIP = "trn2.3xlarge"
ROWS, INNER, WIDE = 256, 512, 1024


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "parts"))


@pytest.fixture(scope="module")
def made(mesh):
    """A product over a dim that is split, in bf16: a core has 128 rows and half of the products, and sums them."""

    def multiply(x_RI, w_IW):
        return jnp.einsum("ri,iw->rw", x_RI, w_IW, preferred_element_type=jnp.bfloat16)

    x_RI = jax.ShapeDtypeStruct((ROWS, INNER), jnp.bfloat16, sharding=NamedSharding(mesh, P("rows", "parts")))
    w_IW = jax.ShapeDtypeStruct((INNER, WIDE), jnp.bfloat16, sharding=NamedSharding(mesh, P("parts", None)))
    return trainfw.plan(multiply, x_RI, w_IW, hardware=CHIP)


def test_what_a_core_computes_moves_and_holds(made):
    chip = load_topology(CHIP)
    assert made.mesh == {"rows": 2, "parts": 2}
    assert made.flops == 2 * (ROWS // 2) * (INNER // 2) * WIDE
    ((transfer, taken),) = made.time.longest
    assert (transfer.kind, transfer.axes, transfer.dtype, transfer.times) == ("all-reduce", ("parts",), "bf16", 1)
    assert transfer.bytes == 2 * (ROWS // 2) * WIDE
    assert taken.seconds - taken.latency == pytest.approx(2 * transfer.bytes / 2 / chip.dim("core").bandwidth)
    assert made.memory.arguments == 2 * (ROWS // 2 * INNER // 2 + INNER // 2 * WIDE)
    assert made.memory.temporaries >= 2 * (ROWS // 2) * WIDE  # the result
    assert made.fits


def test_its_time_adds_up(made):
    assert sum(made.time.parts.values()) == pytest.approx(made.time.seconds)
    assert made.time.parts["parts"] == pytest.approx(made.time.longest[0][1].seconds)  # all of it is waited for
    assert made.time.low <= made.time.seconds <= made.time.high
    assert "optimizer" not in {part for part, seconds in made.time.parts.items() if seconds}


def test_it_is_said_in_few_words_and_as_data(made):
    assert repr(made).startswith("<FunctionPlan: multiply on trn2.3xlarge, ")
    text = str(made)
    assert "multiply on trn2.3xlarge: rows(2) * parts(2)" in text
    assert "MFU" not in text
    assert "tokens" not in text
    found = json.loads(json.dumps(made.to_json()))
    assert found["flops"] == made.flops
    assert found["collectives"][0]["axes"] == ["parts"]


def test_shard_map_and_loops_count(mesh):
    def body(x_RI):
        def turn(carry, _):
            return jax.lax.psum(carry @ carry, "rows"), None

        return jax.lax.scan(turn, x_RI, length=3)[0]

    fn = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    plan = trainfw.plan(fn, jax.ShapeDtypeStruct((64, 64), jnp.float32), hardware=CHIP, mesh=mesh)
    assert plan.flops == 3 * 2 * 64**3
    assert [(t.kind, t.axes, t.times, t.bytes) for t, _ in plan.time.longest] == [
        ("all-reduce", ("rows",), 3, 4 * 64 * 64)
    ]


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_is_the_product_of_its_places_and_windows(stride, groups):
    def convolved(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=dims, feature_group_count=groups
        )
        return jnp.sum(y * y)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, 4), (3, 3, 4 // groups, 6))]
    forward = 2 * 2 * (8 // stride) ** 2 * 6 * 9 * (4 // groups)
    plan = trainfw.plan(jax.grad(convolved, argnums=(0, 1)), *arrays, hardware=CHIP)
    assert plan.flops == 3 * forward
    assert any("convolution" in text for text in plan.time.assumptions)


def grow(x, limit):
    return jax.lax.while_loop(lambda x: x[0, 0] < limit, lambda x: x @ x, x)


def convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
REFUSED = {
    "a loop": ((grow, X, 9.0), {}, "grow.*: a loop runs as often as its values say"),
    "integers": ((lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), jnp.int32)), {}, "no source gives its peak in s32"),
    "hardware": ((jnp.sin, X), {"hardware": "trn9"}, "trn9"),
    "no function": ((7,), {}, "recipe = 7: expected"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_time_is_known_for_is_refused(what):
    arguments, settings, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        trainfw.plan(*arguments, **settings)


def test_a_convolution_is_the_product_of_its_patches_and_kernel():
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 16, 16, 8), (3, 3, 8, 12))]
    plan = trainfw.plan(convolve, *arrays, hardware=CHIP)
    assert [(m.batch, m.m, m.n, m.k) for m in plan.matmuls] == [(1, 2 * 16 * 16, 12, 9 * 8)]
    assert any("convolutions take the time of matrix products" in text for text in plan.time.assumptions)

    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, 2).astype(jnp.float32) ** 2)

    plan = trainfw.plan(jax.grad(loss, (0, 1)), *arrays, hardware=CHIP)
    forward = 2 * (2 * 8 * 8) * 12 * 9 * 8
    assert [(m.flops, m.backward) for m in plan.matmuls] == [(forward, False), (forward, True), (forward, True)]


def test_a_training_step_is_read_as_its_recipe_is(tmp_path):
    recipe = tiny_recipe(tmp_path, f"hardware.topology={CHIP}", "parallel.fsdp=2", "parallel.tensor=2")
    analysis, program, _ = analyse(recipe)
    step = program.functions["train"]
    plan = trainfw.plan(step.jitted, *step.arguments, hardware=CHIP, mesh=program.mesh)
    assert plan.flops == analysis.flops
    assert {(t.kind, t.axes, t.bytes, t.times) for t, _ in plan.time.longest} == {
        (t.kind, t.axes, t.bytes, t.times) for t in analysis.transfers
    }


def test_a_recipe_is_planned_and_checked_on_devices_that_are_simulated_for_it(tmp_path):
    code = f"""
import trainfw
recipe = {str(write_recipe(tmp_path))!r}
print(trainfw.plan(recipe, hardware={CHIP!r}).layout)
print(trainfw.check(recipe, hardware={CHIP!r}).ok)
try:
    trainfw.train(recipe)
except trainfw.UserError as error:
    print(error)
try:
    trainfw.plan(recipe, hardware="trn2.48xlarge")
except trainfw.UserError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    layout, ok, refused, too_few = ran.stdout.splitlines()
    assert (layout, ok) == ("fsdp(4)", "True")
    assert "4 simulated devices, for a plan or a check" in refused
    assert "call trainfw.simulate(devices=64) first, before anything uses jax" in too_few
