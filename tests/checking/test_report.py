"""Reports as data and as text; memory; hardware that Neuron's rules do not bind; bad input."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainfw import Report, UserError
from trainfw.checking import RULES, Finding, check
from trainfw.checking.report import merged
from trainfw.hardware import load_topology
from trainfw.hlo import Place

GIB = 2**30
X = jax.ShapeDtypeStruct((16,), jnp.float32)
HERE, THERE = Place("a.py", 1), Place("a.py", 2)


def test_a_mistake_is_reported_once():
    findings = merged(
        [
            Finding("control-cond", "one", HERE),
            Finding("control-cond", "another", HERE),
            Finding("control-cond", "one", THERE),
            Finding("scatter-drop", "x", THERE),
        ]
    )
    assert [(f.rule, f.place, f.count) for f in findings] == [
        ("control-cond", HERE, 2),
        ("control-cond", THERE, 1),
        ("scatter-drop", THERE, 1),
    ]


def test_a_refused_operation_hides_what_jax_builds_it_from():
    inside = Finding("reduce-variadic", "its pivots", HERE)
    elsewhere = Finding("reduce-variadic", "an argmax", THERE)
    solve = Finding("op-triangular-solve", "solve", HERE)
    assert merged([inside, elsewhere, solve]) == (solve, elsewhere)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_say_what_to_do(rule):
    assert rule.summary
    assert rule.instead
    assert rule.source.startswith(("aws-neuron-sdk ", "jax 0.10 "))
    assert set(rule.hides) <= set(RULES)


def test_a_report_is_data_and_text():
    report = check(lambda x: jnp.argmax(x), X)
    assert isinstance(report, Report)
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is False
    error = next(f for f in data["findings"] if f["severity"] == "error")
    assert error["rule"] == "reduce-variadic"
    assert error["file"] == __file__
    assert error["source"] == RULES["reduce-variadic"].source
    assert data["memory"]["arguments"] == 16 * 4
    text = str(report)
    assert f"error: reduce-variadic: {__file__}:{error['line']}\n" in text
    assert RULES["reduce-variadic"].instead in text
    assert text.splitlines()[-1].startswith("refused: 1 error, 0 warnings")
    assert "clean: 0 errors" in str(check(jnp.sin, X))


def test_collectives_are_summed():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def step(x):
        def layer(x, _):
            return jax.lax.psum(x, "tensor") / 4, None

        mapped = jax.shard_map(
            lambda x: jax.lax.scan(layer, x, None, length=5)[0],
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=False,
        )
        return mapped(x)

    x = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    report = check(step, x, hardware="trn2.3xlarge", lnc=1)  # the mesh is that of the argument
    (row,) = report.collectives
    assert (row.kind, row.axes, row.dtype, row.group_size) == ("all-reduce", ("tensor",), "bf16", 4)
    assert (row.count, row.bytes) == (5, 5 * 8 * 8 * 2)
    assert "all-reduce  tensor  bf16" in str(report)
    assert report.memory.arguments == 8 * 8 * 2


def test_arguments_larger_than_a_core():
    parts = [jax.ShapeDtypeStruct((GIB // 4,), jnp.float32)] * 25  # 25 GiB in arrays of 1
    report = check(lambda *parts: [part[0] for part in parts], *parts)
    assert [f.rule for f in report.errors] == ["memory-arguments"]
    assert "25.00 GiB of state and inputs" in report.errors[0].message
    assert check(lambda *parts: [part[0] for part in parts], *parts[:23]).ok


def test_temporaries_only_warn():
    x = jax.ShapeDtypeStruct((3 * GIB // 4,), jnp.float32)

    def step(x):
        sorted_ = [jnp.sort(x * n) for n in range(9)]  # all of 3 GiB, and all needed at the end
        return sum(part[0] for part in sorted_) + sum(part[-1] for part in reversed(sorted_))

    report = check(step, x)
    assert [f.rule for f in report.warnings] == ["memory-temporaries"]
    assert "overstates" in report.warnings[0].message


def test_hardware_without_neurons_rules():
    report = check(lambda x: jnp.argmax(x), X, hardware="h100-8")
    assert not report.findings
    assert "Neuron's rules do not apply" in report.verdict
    assert check(lambda x: x, X, hardware="cpu").memory.capacity is None


def test_what_is_checked_may_be_jitted_and_arguments_may_be_arrays():
    step = jax.jit(lambda x, n: x * n, static_argnums=1)
    assert check(step, np.ones(4), 3).ok
    assert check(step, jnp.ones(4), 3).ok
    assert check(lambda key: jax.random.uniform(key), jax.random.key(0, impl="rbg")).ok


def test_a_jitted_function_may_say_how_its_arguments_are_split():
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",), axis_types=(AxisType.Auto,))
    step = jax.jit(lambda x: x * 2, in_shardings=NamedSharding(mesh, P("tensor")))
    report = check(step, X, mesh=mesh, hardware="trn2.3xlarge", lnc=1)
    assert report.memory.arguments == 16 * 4 // 8


def test_another_jax_than_the_sdk_has_is_a_note():
    report = check(jnp.sin, X, sdk="2.29")
    assert report.sdk == "2.29"
    assert any("SDK 2.29 supports 0.7.0 to 0.7.0" in f.message for f in report.notes)
    assert report.ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "trn2.48xl"}, "did you mean 'trn2.48xlarge'"),
        ({"lnc": 4}, "LNC"),
        ({"sdk": "1.0"}, "no profile of this Neuron SDK"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        check(jnp.sin, X, **options)


def test_a_mesh_larger_than_the_hardware():
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",))
    with pytest.raises(UserError, match="has 4 cores"):
        check(jnp.sin, X, mesh=mesh, hardware=load_topology("trn2.3xlarge"))


def test_errors_of_the_function_itself_are_its_own():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        check(lambda x: 1 if x[0] > 0 else 2, X)
