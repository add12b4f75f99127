"""An objective that is none of ours, named in a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from tests.helpers import random_batches, tiny_recipe
from trainfw import UserError, build_program
from trainfw.objectives import Mean, NextToken


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
