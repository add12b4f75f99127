"""Reports as data and as text; memory; hardware that Neuron's rules do not bind; bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainfw import Report, UserError
from trainfw.checking import RULES, Finding, check
from trainfw.checking.partitioned import is_partitioned
from trainfw.checking.report import merged
from trainfw.hardware import load_topology
from trainfw.hlo import Place, partition

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
    inside = Finding("reduce-variadic", "its pivots", HERE, origin="jit(solve)")
    beside = Finding("reduce-variadic", "an argmax", HERE, origin="argmax")
    elsewhere = Finding("reduce-variadic", "an argmax", THERE)
    solve = Finding("op-triangular-solve", "solve", HERE, origin="jit(solve)")
    assert merged([inside, elsewhere, solve]) == (solve, elsewhere)
    assert merged([inside, beside, solve]) == (beside, solve)


def test_counts_are_of_one_function():
    train = [Finding("scatter-drop", "x", HERE, program="train")] * 3
    both = merged([*train, Finding("scatter-drop", "x", HERE, program="evaluate")])
    assert [f.count for f in both] == [3]
    whole = [Finding("memory-arguments", "too much", program=program) for program in ("train", "evaluate")]
    assert [f.count for f in merged(whole)] == [1]
    assert "operations" not in str(merged(whole)[0])


INTEGERS = jax.ShapeDtypeStruct((16,), jnp.int32)
MATRIX = jax.ShapeDtypeStruct((16, 16), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
SEVERAL_ON_A_LINE = {
    "solve and argmax": (
        lambda x: jnp.linalg.solve(x, x).sum() + jnp.argmax(x),
        (MATRIX,),
        {"op-triangular-solve", "reduce-variadic"},
    ),
    "svd and argmax": (
        lambda x: jnp.linalg.svd(x)[1].sum() + jnp.argmax(x),
        (MATRIX,),
        {"op-no-lowering", "reduce-variadic"},
    ),
    "fft and sort": (
        lambda x: (abs(jnp.fft.fft(x)), jax.lax.sort((x, -x), num_keys=2)),
        (X,),
        {"dtype-complex", "sort"},
    ),
    "randint, take and threefry": (
        lambda k, x, i: (jax.random.randint(k, (3,), 0, 4), jnp.take(x, i), jax.random.normal(jax.random.key(0))),
        (KEY, X, INTEGERS),
        {"rng-randint", "gather-fill"},
    ),
}


@pytest.mark.parametrize("name", SEVERAL_ON_A_LINE)
def test_independent_mistakes_on_one_line(name):
    fn, arguments, rules = SEVERAL_ON_A_LINE[name]
    assert {finding.rule for finding in check(fn, *arguments).errors} == rules


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


@pytest.mark.parametrize(("sdk", "runtime"), [("2.32", 183), ("2.33", 305)])
def test_what_the_runtime_takes_counts(sdk, runtime):
    """24 GiB a core, of which the runtime takes 183 MiB: 96 MB on each of two physical cores; of SDK 2.33 160 MB."""

    def step(*parts):
        return [part[0] for part in parts]

    gibibytes = [jax.ShapeDtypeStruct((GIB // 4,), jnp.float32)] * 23
    for free, rules in ((runtime - 1, ["memory-arguments"]), (runtime + 1, [])):
        rest = jax.ShapeDtypeStruct((GIB // 4 - free * 2**18,), jnp.float32)
        assert [f.rule for f in check(step, *gibibytes, rest, sdk=sdk).errors] == rules


def test_temporaries_only_warn():
    x = jax.ShapeDtypeStruct((3 * GIB // 4,), jnp.float32)

    def step(x):
        sorted_ = [jnp.sort(x * n) for n in range(9)]  # all of 3 GiB, and all needed at the end
        return sum(part[0] for part in sorted_) + sum(part[-1] for part in reversed(sorted_))

    report = check(step, x)
    assert [f.rule for f in report.warnings] == ["memory-temporaries"]
    assert "widens bf16 to f32 and so overstates; `trainfw plan` counts them" in report.warnings[0].message
    assert "(trainfw plan counts them as the program asked for)" in str(report)


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


def test_what_is_not_confirmed_of_python_is_not_said_of_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.11.0")
    monkeypatch.setattr(sys, "version_info", (3, 15, 0, "final", 0))
    notes = {f.rule: f for f in check(jnp.sin, X, sdk="2.33").notes}
    assert notes["sdk-version"].note == ""
    assert "not confirmed" in notes["sdk-python"].note
    assert "checked with Python 3.15; SDK 2.33 supports 3.11 to 3.13" in notes["sdk-python"].message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "trn2.48xl"}, "did you mean 'trn2.48xlarge'"),
        ({"lnc": 4}, "LNC"),
        ({"sdk": "1.0"}, "no profile of this Neuron SDK"),
        ({"sdk": 2}, "sdk = '2': no profile of this Neuron SDK"),
        ({"hardware": 7}, "hardware = 7: expected a topology, or the name of one"),
        ({"count": 1.5}, r"count = 1\.5: expected a whole number"),
        ({"count": True}, "count = True: expected a whole number"),
        ({"lnc": "2"}, "lnc = '2': expected a whole number"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        check(jnp.sin, X, **options)


def test_a_mesh_larger_than_the_hardware():
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",))
    with pytest.raises(UserError, match="has 4 cores"):
        check(jnp.sin, X, mesh=mesh, hardware=load_topology("trn2.3xlarge"))


MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
REVERSED = Mesh(np.array(jax.devices()[7::-1]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
HALVES = [Mesh(np.array(jax.devices()[i : i + 4]), ("tensor",), axis_types=(AxisType.Auto,)) for i in (0, 4)]
BOTH = P(("data", "tensor"))
NAMES_A_MESH = {
    "in_shardings": (jax.jit(lambda x: x.sum(), in_shardings=NamedSharding(MESH, BOTH)), ("data", "tensor")),
    "shard_map": (
        jax.shard_map(lambda x: jax.lax.psum(x, "tensor"), mesh=MESH, in_specs=BOTH, out_specs=P("data")),
        ("tensor",),
    ),
    "a constraint": (
        lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(MESH, P("tensor"))).sum(),
        ("tensor",),
    ),
    "a constraint in a loop": (
        lambda x: jax.lax.fori_loop(
            0, 3, lambda _, x: x + jax.lax.with_sharding_constraint(x, NamedSharding(MESH, P("tensor"))).sum(), x
        ),
        ("tensor",),
    ),
    "pmap": (jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i"), ("i",)),
}


@pytest.mark.parametrize("name", NAMES_A_MESH)
def test_the_mesh_that_a_function_names(name):
    fn, axes = NAMES_A_MESH[name]
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    report = check(fn, x, hardware="trn2.3xlarge", lnc=1)
    assert report.ok
    assert {row.axes for row in report.collectives} == {axes}


def test_cores_are_those_of_the_devices_that_the_program_is_compiled_for():
    step = jax.jit(lambda x: x.sum(), in_shardings=NamedSharding(HALVES[1], P("tensor")))
    with pytest.raises(UserError, match="has device 7, but"):
        check(step, X, hardware="trn2.3xlarge")
    (row,) = check(jax.jit(lambda x: x.sum(), in_shardings=NamedSharding(REVERSED, BOTH)), X).collectives
    assert row.axes == ("data", "tensor")


def test_a_mesh_without_devices():
    abstract = MESH.abstract_mesh
    spec = {"in_specs": BOTH, "out_specs": P("data")}
    mapped = jax.shard_map(lambda x: jax.lax.psum(x, "tensor"), mesh=abstract, **spec)
    split = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(abstract, BOTH))
    for fn, argument in ((mapped, X), (jax.jit(mapped), X), (jnp.sum, split)):
        with pytest.raises(UserError, match="pass mesh="):
            check(fn, argument)
        assert check(fn, argument, mesh=MESH).collectives[0].kind == "all-reduce"
    with pytest.raises(UserError, match=r"expected a .*Mesh of devices"):
        check(jnp.sin, X, mesh=abstract)
    assert jax.sharding.get_mesh().empty


def test_meshes_of_different_devices():
    def step(x):
        halves = [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("tensor"))) for mesh in HALVES]
        return halves[0] + halves[1]

    for hardware in ("trn2.48xlarge", "h100-8"):
        with pytest.raises(UserError, match="Received incompatible devices") as raised:
            check(step, X, hardware=hardware)
        assert f"{__file__}:" in str(raised.value)


def test_functions_of_flax():
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)

    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: model(x).sum())(model))
        return jnp.argmax(model(x))

    parameters = 16 * 16 + 16
    report = check(nnx.jit(lambda model, x: model(x)), model, x)
    assert report.ok
    assert report.memory.arguments == (parameters + 4 * 16) * 4
    report = check(nnx.jit(step), model, optimizer, x)
    assert [(f.rule, f.place.file) for f in report.errors] == [("reduce-variadic", __file__)]
    assert not report.warnings  # decay ** step
    assert report.memory.arguments == (3 * parameters + 4 * 16 + 2) * 4


def test_an_initialisation_that_nobody_uses():
    network = nn.RNN(nn.LSTMCell(8))
    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.ones((2, 3, 4))))
    assert not check(network.apply, variables, x).errors


def test_what_the_cpu_cannot_compile_is_said():
    double = pl.pallas_call(lambda x, out: out.__setitem__(..., x[...] * 2), out_shape=X)
    report = check(double, X, hardware="h100-8")
    assert [(f.rule, f.severity) for f in report.findings] == [("not-partitioned", "warning")]
    assert "Only interpret mode is supported on CPU" in report.findings[0].message
    assert report.memory.arguments == 16 * 4
    assert {f.rule for f in check(double, X).findings} >= {"op-no-lowering", "not-partitioned"}


def test_a_module_that_xla_did_not_partition_is_not_read(monkeypatch):
    def step(mesh):
        mapped = jax.shard_map(lambda x: x * jax.lax.psum(x, "tensor"), mesh=mesh, in_specs=BOTH, out_specs=BOTH)
        return jax.jit(mapped, in_shardings=NamedSharding(MESH, BOTH) if mesh is MESH else None)

    whole = partition(step(MESH.abstract_mesh).lower(X))  # XLA refuses it
    assert whole.compiled is None
    assert not is_partitioned(whole.module)
    assert is_partitioned(partition(step(MESH).lower(X)).module)
    monkeypatch.setattr("trainfw.checking.programs.partition", lambda *_, **__: whole)
    report = check(step(MESH), X)
    assert [f.rule for f in report.warnings] == ["not-partitioned"]
    assert not report.collectives


def test_devices_that_nothing_names(monkeypatch):
    """As when XLA's CPU compiler gives up after it has partitioned."""
    monkeypatch.setattr(
        "trainfw.checking.programs.partition", lambda *a, **k: replace(partition(*a, **k), compiled=None)
    )
    step = jax.jit(lambda x: x.sum(), in_shardings=NamedSharding(MESH, BOTH))
    with pytest.raises(UserError, match="for 8 devices, and nothing says which: pass mesh="):
        check(step, X)
    report = check(step, X, mesh=MESH)
    assert report.memory.temporaries is None
    assert [row.axes for row in report.collectives] == [("data", "tensor")]


def test_integer_reductions_name_their_axes():
    fn = jax.shard_map(lambda x: jax.lax.psum(x, "tensor"), mesh=MESH, in_specs=BOTH, out_specs=P("data"))
    (error,) = check(fn, INTEGERS, hardware="trn2.3xlarge", lnc=1).errors
    assert error.message == "all-reduce of s32[2] over tensor (groups of 4)"


def test_errors_of_ones_own_parser_are_not_a_clean_report(monkeypatch):
    def fail(*_):
        raise ValueError("replica groups '[what]': no form of HLO that is known")

    monkeypatch.setattr("trainfw.hlo.partitioning.parse_module", fail)
    with pytest.raises(ValueError, match="no form of HLO"):
        check(jnp.sin, X)


NEEDS_A_VALUE = {
    "float": lambda x: x * float(x.sum()),
    "int": lambda x: x[int(x[0])],
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "range": lambda x: list(range(x.argsort()[0])),
    "numpy": lambda x: np.asarray(x),
}


@pytest.mark.parametrize("name", NEEDS_A_VALUE)
@pytest.mark.parametrize("hardware", ["trn2.48xlarge", "h100-8"])
def test_values_that_python_would_need(name, hardware):
    fn = NEEDS_A_VALUE[name]
    with pytest.raises(UserError, match="known only when it runs") as raised:
        check(fn, X, hardware=hardware)
    assert f"{__file__}:{fn.__code__.co_firstlineno}" in str(raised.value)


DEPENDS_ON_VALUES = {
    "arange": lambda n: jnp.arange(n),
    "zeros": lambda n: jnp.zeros((n, 2)),
    "repeat": lambda n: jnp.repeat(jnp.ones(3), jnp.full(3, n)),
    "slice": lambda n: jnp.ones(5)[:n],
    "where": lambda n: jnp.where(jnp.arange(5) > n),
    "one_hot": lambda n: jax.nn.one_hot(jnp.arange(3), n),
}


@pytest.mark.parametrize("name", DEPENDS_ON_VALUES)
def test_shapes_that_depend_on_values(name):
    fn = DEPENDS_ON_VALUES[name]
    report = check(fn, jax.ShapeDtypeStruct((), jnp.int32))
    assert [f.rule for f in report.errors] == ["shape-dynamic"]
    assert report.errors[0].place == Place(__file__, fn.__code__.co_firstlineno)


def test_errors_of_the_function_itself_are_its_own():
    with pytest.raises(TypeError, match="incompatible shapes for broadcasting"):
        check(lambda x: x + jnp.ones(3), X)
    with pytest.raises(ZeroDivisionError):
        check(lambda x: 1 / 0, X)


def test_a_kernel_of_one_core_needs_no_mesh():
    report = check(lambda x: jax.ffi.ffi_call("AwsNeuronSilu", X)(x), X)
    assert report.ok
    assert report.memory.arguments == 16 * 4


def test_documents_and_measurements_that_disagree_are_both_told():
    (finding,) = check(jnp.argmax, X, hardware="inf2.48xlarge").warnings
    assert "documents: not supported. Measured on this chip" in finding.note
    assert f"    note     {finding.note}" in str(finding)
    assert "measured: " in finding.source
    data = finding.to_json()
    assert (data["note"], data["keyed_on"]) == (finding.note, ["chip"])
    (error,) = check(jnp.argmax, X, hardware="trn2.48xlarge").errors
    assert "not measured on this chip" in error.note
