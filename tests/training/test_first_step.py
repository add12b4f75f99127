"""The look at a session's first step: nothing is said of right ones, and what donation could spoil is seen."""

from __future__ import annotations

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import losses, random_batches, tiny_recipe
from trainfw import RunError, backends, build_program, train
from trainfw.objectives import Mean
from trainfw.optim import OptimizerConfig, make_optimizer, traits_of
from trainfw.training.first_step import FirstStep, _samples
from trainfw.training.session import Session

RATE = "optimizer.learning_rate=1e-3"


@pytest.fixture
def as_neuron():
    backends.prepare(as_backend="neuron")
    yield
    backends.prepare()


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """(what was looked at before the step, the state after it, metrics)"""
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"), RATE, "optimizer.ema=0.9")
    program = build_program(recipe, jax.devices()[:2])
    state = program.init()
    batch = program.shard_batch(random_batches(recipe, 1)[0])
    first = FirstStep(recipe, state, program.compile_eval_step()(state.params, state.frozen, batch)["loss"].value())
    after, metrics = program.compile_train_step()(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params)), "the look leaves the state to be donated"
    return first, after, metrics


def with_table(state, change):
    table = change(state.params["embedding"]["table"])
    return dataclasses.replace(state, params={**state.params, "embedding": {"table": table}})


def with_average(state, change):
    spoilt = state.opt_state._replace(average=jax.tree.map(change, state.opt_state.average))
    return dataclasses.replace(state, opt_state=spoilt)


def test_a_right_step_is_right(stepped):
    first, after, metrics = stepped
    assert first.problem(after, metrics) is None
    assert first.loss == pytest.approx(metrics["loss"].value(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s, m: (with_table(s, lambda x: x * jnp.nan), m), "embedding.table is not finite"),
        (
            lambda s, m: (with_table(s, lambda x: x.at[3].add(0.01)), m),
            r"embedding\.table has moved by 0\.0\d+, more than",
        ),
        (lambda s, m: (with_table(s, jnp.zeros_like), m), r"table.* has moved by"),
        (lambda s, m: (with_average(s, lambda x: 2 * x), m), "the average of .* is not between what it was and"),
        (lambda s, m: (with_average(s, lambda x: x * jnp.inf), m), "the average of .* is not finite"),
        (lambda s, m: (dataclasses.replace(s, step=s.step + 1), m), "it counts as step 2, after 0"),
        (lambda s, m: (dataclasses.replace(s, rng=s.rng + 1), m), "rng has changed, which does not learn"),
        (lambda s, m: (s, {**m, "loss": Mean(jnp.float32(9.0), 1.0)}), "its loss is 9, and the evaluation step's"),
    ],
)
def test_what_is_spoilt_is_seen(stepped, change, problem):
    first, after, metrics = stepped
    assert re.search(problem, first.problem(*change(after, metrics)) or "")


def test_a_state_that_stays_is_seen(stepped):
    first, after, metrics = stepped
    same = copy.copy(first)
    same.step, same.params = 1, _samples(after.params)
    assert same.problem(dataclasses.replace(after, step=after.step + 1), metrics) == "no parameter has changed"


def test_of_a_step_that_faults_judges_nothing_is_said(stepped):
    first, after, metrics = stepped
    spoilt = {**metrics, "loss": Mean(jnp.float32(np.nan), 1.0)}
    assert first.problem(with_table(after, lambda x: x * jnp.nan), spoilt) is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["adamw", "lion", "adafactor", "muon"]),
    st.lists(st.sampled_from([0.0, 1e-6, 1e-2, 1.0, -1.0, -30.0]), min_size=1, max_size=6),
    st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.95, 0.5), (0.0, 0.9)]),
)
def test_no_optimizer_exceeds_its_largest_update(name, scales, betas):
    config = OptimizerConfig(
        name=name, schedule="constant", learning_rate=1e-2, weight_decay=0.0, clip_norm=None, b1=betas[0], b2=betas[1]
    )
    optimizer = make_optimizer(config, 10)
    noise = jax.random.normal(jax.random.key(0), (3, 8, 6))
    params = {"layers": {"mlp": {"up": {"kernel": noise}}}, "final": {"scale": noise[0, 0]}}
    state = optimizer.init(params)
    for step, scale in enumerate(scales, 1):
        updates, state = optimizer.update(jax.tree.map(lambda x, s=scale: x * s, params), state, params)
        for update in jax.tree.leaves(updates):
            assert np.max(np.abs(update)) <= 1.01e-2 * traits_of(config).largest_update(config, step, update.size)


@pytest.mark.long
@pytest.mark.usefixtures("as_neuron")
def test_a_run_on_neuron_looks_at_the_first_step_of_each_session(tmp_path, monkeypatch):
    looked = []
    problem = FirstStep.problem

    def noted(self, state, metrics):
        looked.append((self.step, self.loss, problem(self, state, metrics)))
        return looked[-1][-1]

    monkeypatch.setattr(FirstStep, "problem", noted)
    overrides = ("checkpoint.every=2", RATE)
    for steps in (2, 4):
        train(tiny_recipe(tmp_path, f"train.steps={steps}", *overrides), run_dir=tmp_path / "run")
    assert [(step, told) for step, _, told in looked] == [(0, None), (2, None)]
    for (_, loss, _), found in zip(looked, (losses(tmp_path / "run")[step] for step in (1, 3)), strict=True):
        assert loss == pytest.approx(found, rel=1e-5)


@pytest.mark.usefixtures("as_neuron")
def test_a_spoilt_first_step_ends_the_run_and_saves_nothing(tmp_path, monkeypatch):
    step = Session._step

    def spoilt(self, state, batch):
        after, metrics = step(self, state, batch)
        return with_table(after, lambda x: jax.jit(lambda x: 0 * x)(x)), metrics

    monkeypatch.setattr(Session, "_step", spoilt)
    recipe = tiny_recipe(tmp_path, "train.steps=2", "checkpoint.every=1", RATE)
    with pytest.raises(RunError, match=r"first step cannot be right: .*table.* has moved .*backend\.donate=false"):
        train(recipe, run_dir=tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    other = tiny_recipe(tmp_path, "train.steps=1", "backend.donate=false", RATE)
    train(other, run_dir=tmp_path / "other")  # to be looked at by nobody
