"""The estimate of a program's instructions, by tiles counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from trainfw.backends import load_sdk
from trainfw.checking import check_program, instructions, read_function
from trainfw.checking.instructions import count_instructions, read_instructions
from trainfw.hardware import load_topology
from trainfw.serving import Serving, build_absent


@pytest.fixture(scope="module")
def topology():
    return load_topology("trn2.3xlarge")


def module(topology, fn, *shapes):
    arguments = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return read_function(fn, arguments, None, topology).partitioned.module


def test_tiles_are_those_of_the_engine(topology):
    found = module(topology, lambda x, w: x @ w, (8, 300), (300, 1024))
    assert count_instructions(found, topology) == (6, 6)  # 8 rows stay, 1,024 columns in 2 parts, 300 in 3
    wide = module(topology, lambda x, w: jnp.tanh(x @ w), (256, 512), (512, 2048))
    products, elements = 2 * 4 * 4, 256 * 2048 // (128 * 512)
    assert products + elements <= count_instructions(wide, topology)[0] <= products + 3 * elements  # conversions


def test_loops_once_and_turn_by_turn(topology):
    def loop(x, w):
        return lax.fori_loop(0, 10, lambda _, carry: carry @ w, x)

    found = module(topology, loop, (128, 128), (128, 128))
    assert count_instructions(found, topology) == (2, 20)  # a product and the loop's own sum


@pytest.mark.parametrize(
    ("limit", "unrolled", "rules"),
    [
        (1, False, ["instructions"]),
        (10, False, []),
        (10, True, ["instructions"]),
        (30, True, ["instructions-near"]),
        (40, True, []),
    ],
)
def test_near_is_within_half(topology, monkeypatch, limit, unrolled, rules):
    def loop(x, w):
        return lax.fori_loop(0, 10, lambda _, carry: carry @ w, x)

    found = module(topology, loop, (128, 128), (128, 128))
    monkeypatch.setattr(instructions, "LIMIT", limit)
    assert [finding.rule for finding in read_instructions(found, topology, unrolled=unrolled)] == rules


def test_a_server_is_counted_as_it_runs(topology, monkeypatch):
    devices = jax.devices()[: topology.cores]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    server = build_absent(
        Serving("smollm2-135m", {"data": 4}, slots=1, length=64, chunk=16, weights="bfloat16"), topology
    )
    report = check_program(server, topology=topology, sdk=load_sdk())
    assert not [finding for finding in report.findings if finding.rule.startswith("instructions")]
    monkeypatch.setattr(instructions, "LIMIT", 3000)  # of 135 million weights, in tiles of 65,536
    report = check_program(server, topology=topology, sdk=load_sdk())
    found = [finding for finding in report.findings if finding.rule.startswith("instructions")]
    assert {name for finding in found for name in finding.programs} == {"prefill", "decode", "decode_sampled"}
    assert all("an estimate" in finding.note for finding in found)
