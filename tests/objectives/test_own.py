"""An objective that is none of ours, named in a recipe."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_batches, tiny_recipe
from trainfw import UserError, build_program
from trainfw.objectives import Mean, NextToken, check_returned, token_rows
from trainfw.objectives.contract import RESERVED
from trainfw.training.session import Session


@dataclass(frozen=True)
class Squared:
    """The square of the reference's part in the next token's loss, beside that loss itself."""

    weight: float
    unit = "token"
    roles = ("reference",)

    def schema(self, batch, sequence):
        return NextToken().schema(batch, sequence)

    def loss(self, models, batch, draw):
        loss, sums = NextToken().loss(models, batch, draw)
        _, of_reference = NextToken().loss({"learner": models["reference"]}, batch, draw)
        return loss * self.weight, sums | {"reference_loss": Mean(of_reference["loss"].total, sums["loss"].count)}


NAME = "objective.name=tests.objectives.test_own:Squared"


def test_it_has_all_of_the_program(tmp_path):
    own = tiny_recipe(
        tmp_path, NAME, "objective.options={weight: 2.0}", "train.accumulation_steps=2", "parallel.fsdp=2"
    )
    plain = tiny_recipe(tmp_path)
    program, usual = build_program(own, jax.devices()[:2]), build_program(plain, jax.devices()[:1])
    state, batch = program.init(), random_batches(plain, 1)[0]
    grads, metrics = program.gradients(state.params, state.frozen, program.shard_batch(batch))
    expected, _ = usual.gradients(usual.init().params, {}, usual.shard_batch(batch))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, 2 * np.asarray(theirs), rtol=1e-4, atol=1e-6)
    assert metrics["reference_loss"].value() == pytest.approx(metrics["loss"].value(), rel=1e-6)
    state, before = program.train_step(state, program.shard_batch(batch))
    _, after = program.train_step(state, program.shard_batch(batch))
    assert after["reference_loss"].value() == before["reference_loss"].value()  # which does not learn
    assert after["loss"].value() < before["loss"].value()


def test_what_cannot_be_made_is_said(tmp_path):
    for name, said in {
        "nowhere:Loss": r"objective.name.*nowhere:Loss.*No module named 'nowhere'",
        "tests.objectives.test_own:Cubed": "has no attribute 'Cubed'",
        "tests.objectives.test_own:Squared": "missing 1 required positional argument: 'weight'",
        "shutil:rmtree": r"is a function; expected a class, a trainfw.objectives.Objective",
        "collections:OrderedDict": r"has no schema and no loss; expected",
    }.items():
        with pytest.raises(UserError, match=said):
            build_program(tiny_recipe(tmp_path, f"objective.name={name}"), jax.devices()[:1])


def handed(tmp_path, objective):
    return build_program(tiny_recipe(tmp_path), jax.devices()[:1], objective=objective)


def changed(**parts):
    return type("Changed", (Squared,), parts)(1.0)


def test_parts_and_schemas_that_break_the_contract_are_refused(tmp_path):
    def fails(self, batch, sequence):
        return 1 / 0

    for objective, said in {
        NextToken: r"objective.name = 'trainfw.*NextToken': is a class; expected an object, such as NextToken",
        changed(roles="reference"): r"roles is 'reference'; expected a tuple of names",
        changed(roles=("learner",)): r"roles is \('learner',\); expected frozen models beside the learner",
        changed(roles=("base",)): "expected frozen models beside the learner",
        changed(unit=3): "unit is 3; expected a name",
        changed(schema=lambda *_: None): r"schema returns None; expected a trainfw.objectives.Schema",
        changed(schema=lambda _, b, s: token_rows(b, s, group=2)): (
            r"schema has tokens of int32 \(\d+, 2, \d+\), and the rows of data.format have it of int32 \(\d+, \d+\)"
        ),
        changed(schema=fails): r"its schema raises ZeroDivisionError: division by zero \(.*test_own.py:\d+\)",
    }.items():
        with pytest.raises(UserError, match=said):
            handed(tmp_path, objective)


def test_what_a_loss_returns_is_refused_while_it_is_traced(tmp_path):
    one, mean = jnp.float32(1), Mean(jnp.float32(1), jnp.float32(1))
    assert check_returned((one, {"loss": mean, "other": Mean(1.0, 2)}), "a:B", "token")[0] is one
    for returned, said in (
        (None, r"name = 'a:B': loss returns None; expected a pair"),
        (one, r"loss returns float32\[\]; expected a pair"),
        ((one, {}, 3), "expected a pair"),
        ((jnp.ones(2), {"loss": mean}), r"returns float32\[2\] as the loss; expected one floating-point number"),
        ((jnp.int32(1), {"loss": mean}), r"returns int32\[\] as the loss"),
        ((one, {"other": mean}), r"no 'loss' among \['other'\]; expected sums\['loss'\]"),
        ((one, {"loss": one}), r"sums that have float32\[\]; expected sums\['loss'\]"),
        ((one, {"loss": mean, 3: mean}), "a metric named 3; expected a str"),
        ((one, {"loss": mean, "x": one}), r"float32\[\] as the metric 'x'; expected a trainfw.objectives.Mean"),
        (
            (one, {"loss": mean, "x": Mean(jnp.ones(3), 1.0)}),
            r"float32\[3\], 1.0\) as the metric 'x'; expected",
        ),
        *(
            ((one, {"loss": mean, taken: mean}), f"metric named '{taken}', which trainfw")
            for taken in (*TAKEN, "tokens")
        ),
    ):
        with pytest.raises(UserError, match=said):
            check_returned(returned, "a:B", "token")
    with pytest.raises(UserError, match=r"^objective.name = '.*Changed': loss returns None; expected a pair"):
        handed(tmp_path, changed(roles=(), loss=lambda *_: None))


TAKEN = ("mfu", "step", "validation_loss", "evaluation_f1", "grad_norm", "tokens")


def test_every_name_in_a_row_of_metrics_is_reserved():
    names = set(re.findall(r'"(\w+)":', inspect.getsource(Session._log_step)))
    assert {"mfu", "goodput"} <= names
    assert names - {"loss"} <= RESERVED
