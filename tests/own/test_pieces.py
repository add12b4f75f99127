"""Pieces by name and by hand, without a run."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import Heard, random_batches, tiny_recipe
from tests.own.pieces import TOY, Doubled, scaled_signs
from trainfw import Callback, UserError, backends, build_program
from trainfw.backends import select
from trainfw.optim import OptimizerConfig, Traits, make_optimizer, state_bytes, traits_of
from trainfw.pieces import is_own, load_piece, name_of, options_of
from trainfw.training.callbacks import Callbacks
from trainfw.training.loggers import Logger, MetricsLog
from trainfw.training.run_directory import RunDirectory

SIGNS = "tests.own.pieces:scaled_signs"


def test_a_piece_is_named_with_what_it_was_made_with():
    made = functools.partial(scaled_signs, scale=2.0)
    assert (name_of(made), options_of(made)) == (SIGNS, {"scale": 2.0})
    assert (name_of(Doubled(3.0)), options_of(Doubled(3.0))) == ("tests.own.pieces:Doubled", {"factor": 3.0})
    scale = 5

    def closed(learning_rate):
        return scaled_signs(learning_rate, scale=scale)

    assert options_of(closed) == {"scale": 5}
    assert is_own(name_of(closed))
    assert not is_own("adamw")
    assert not is_own("C:/data")


@pytest.mark.parametrize(
    ("settings", "factory"),
    [
        ({"name": "optax:sgd", "options": {"momentum": 0.9}}, lambda rate: optax.sgd(rate, momentum=0.9)),
        ({"name": SIGNS, "options": {"scale": 2.0}}, lambda rate: scaled_signs(rate, scale=2.0)),
    ],
)
def test_a_named_optimizer_is_that_transformation_after_clipping(settings, factory):
    config = OptimizerConfig(**settings, learning_rate=0.1, schedule="constant", clip_norm=0.5)
    ours = make_optimizer(config, 10)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), factory(optax.constant_schedule(0.1)))
    params = {"layers": {"w": {"kernel": jnp.ones((3, 4))}}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    states = ours.init(params), theirs.init(params)
    for _ in range(2):
        (mine, first), (other, second) = ours.update(grads, states[0], params), theirs.update(grads, states[1], params)
        np.testing.assert_allclose(mine["layers"]["w"]["kernel"], other["layers"]["w"]["kernel"], rtol=1e-5)
        states = first, second


def test_what_an_optimizer_of_ones_own_does_not_read_is_refused_and_not_recorded():
    assert not {"b1", "weight_decay"} & set(OptimizerConfig(name=SIGNS, options={"scale": 1.0}).model_dump())
    assert {"b1", "weight_decay"} <= set(OptimizerConfig().model_dump())
    with pytest.raises(ValueError, match="weight_decay is not read by an optimizer of your own"):
        OptimizerConfig(name=SIGNS, weight_decay=0.5)
    with pytest.raises(ValueError, match="options are for an optimizer of your own"):
        OptimizerConfig(options={"scale": 1.0})


def test_an_optimizer_that_says_nothing_of_itself_is_taken_for_the_worst():
    config = OptimizerConfig(name="optax:adam")
    assert traits_of(config) == Traits()
    assert traits_of(config).whole_matrices
    assert traits_of(config).may_overflow
    # Two moments of the parameter's own shape, cut as it is.
    assert state_bytes(config, "layers.kernel", (2, 128, 256), 4) == 2 * 4 * 2 * 128 * 256 // 4
    assert state_bytes(OptimizerConfig(), "layers.kernel", (2, 128, 256), 4) == 2 * 4 * 2 * 128 * 256 // 4

    def known(learning_rate):
        return optax.sgd(learning_rate)

    known.traits = Traits(whole_matrices=False)
    assert not traits_of(config, known).whole_matrices


def test_what_is_no_optimizer_is_said(tmp_path):
    devices = jax.devices()[:1]
    for piece, said in {
        optax.sgd(0.1): "optimizer.name = 'optax.*': expected a function of the learning rate",
        (lambda rate: rate): "returns a function of the learning rate; expected an Optax transformation",
    }.items():
        with pytest.raises(UserError, match=said):
            build_program(tiny_recipe(tmp_path), devices, optimizer=piece)
    with pytest.raises(UserError, match=r"optimizer.name.*optax:sdg.*has no attribute 'sdg'"):
        build_program(tiny_recipe(tmp_path, "optimizer.name=optax:sdg"), devices)


def test_a_handed_objective_is_the_named_one(tmp_path):
    recipe = tiny_recipe(tmp_path)
    named = tiny_recipe(tmp_path, "objective.name=tests.own.pieces:Doubled", "objective.options={factor: 3.0}")
    handed = build_program(recipe, jax.devices()[:1], objective=Doubled(3.0))
    assert handed.recipe == named
    program, batch = build_program(named, jax.devices()[:1]), random_batches(recipe, 1)[0]
    params = program.init().params
    gradients = [one.gradients(params, {}, one.shard_batch(batch))[0] for one in (handed, program)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *gradients)))
    with pytest.raises(UserError, match=r"objective.name.*has no schema and no loss and no roles and no unit"):
        build_program(recipe, jax.devices()[:1], objective=Heard())


class Kept(Logger):
    """Keeps its rows, and fails as it is told."""

    def __init__(self):
        self.rows, self.rewound, self.fails = [], [], None

    def write(self, rows):
        if self.fails is not None:
            raise self.fails
        self.rows += rows

    def rewind(self, step):
        self.rewound.append(step)
        self.rows = [row for row in self.rows if row["step"] <= step]


def test_a_logger_gets_every_row_as_data_and_late_ones_again(tmp_path):
    kept, heard = Kept(), Heard()
    log = MetricsLog(RunDirectory(tmp_path), 3, heard, loggers=[kept])
    log.write({"step": 4, "loss": 1.0})
    kept.fails = ConnectionResetError("the line is dead")
    log.write({"step": 5, "loss": None})
    kept.fails = None
    log.write({"step": 6, "loss": 0.5})
    assert kept.rows == [{"step": 4, "loss": 1.0}, {"step": 5, "loss": None}, {"step": 6, "loss": 0.5}]
    assert [row["step"] for row in log.rows()] == [4, 5, 6]
    log.rewind(4)
    assert (kept.rewound, [row["step"] for row in kept.rows]) == ([3, 4], [4])
    assert "cannot be written: the line is dead; they are kept" in heard.notes[0]
    kept.fails = KeyError("x")
    log.write({"step": 5, "loss": 0.5})
    assert str(log.failure) == "logger tests.own.test_pieces:Kept: KeyError: 'x'"
    kept.fails = None
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 5, "loss": 0.5}


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "1 / 0", "def"])
def test_a_module_that_cannot_be_imported_is_refused_by_name(code, tmp_path, monkeypatch):
    (tmp_path / "no_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^source = 'no_module:rows': cannot be made: \w+: "):
        load_piece("no_module:rows", "source")


class Bare:
    """All that a logger has to have; it changes what it gets."""

    def write(self, rows):
        for row in rows:
            row.clear()

    def rewind(self, step): ...


class Leaves(Callback, Bare):
    def step(self, step, metrics):
        sys.exit(0)

    def rewind(self, step):
        sys.exit(0)


def test_a_piece_that_leaves_has_failed(tmp_path):
    callbacks = Callbacks([Leaves()])
    callbacks.tell("step", 3, {})
    assert callbacks.failure() == "callback Leaves at step 3: step: SystemExit: 0"
    log = MetricsLog(RunDirectory(tmp_path), 3, Heard(), loggers=[Leaves()])
    log.catch_up()
    assert str(log.failure) == "logger tests.own.test_pieces:Leaves: SystemExit: 0"


class Unclosed(Bare):
    def close(self):
        raise AttributeError("no file")


def test_a_logger_has_rows_of_its_own_and_need_not_have_an_end(tmp_path):
    heard, row = Heard(), {"step": 1, "loss": 1.0}
    log = MetricsLog(RunDirectory(tmp_path), None, heard, loggers=[Bare(), Unclosed()])
    log.write(row)
    log.catch_up(durable=True)
    log.close()
    assert row == {"step": 1, "loss": 1.0}
    assert heard.notes == ["warning: logger tests.own.test_pieces:Unclosed: AttributeError: no file"]


def test_a_backend_of_ones_own_is_simulated_by_its_name(monkeypatch):
    for known in ("BACKENDS", "SIMULATED"):
        monkeypatch.setattr(select, known, dict(getattr(select, known)))
    try:
        backends.prepare(as_backend="tests.own.pieces:TOY")
        assert (backends.current().name, backends.current().platform) == ("toy", "cpu")
        assert backends.current().top_k == "iterative"
        backends.prepare(as_backend="toy")
        with pytest.raises(UserError, match="backend 'neuron': trainfw has one for 'neuron' already"):
            backends.register(replace(TOY, name="neuron"))
        with pytest.raises(UserError, match=r"as_backend = .toys.: is not a backend .*; did you mean .toy.\?"):
            backends.prepare(as_backend="toys")
    finally:
        backends.prepare()
