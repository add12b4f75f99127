"""A family, an objective, an optimizer, a source of data and a backend of one's own: trained, planned and checked."""

from __future__ import annotations

import jax
import pytest
import yaml

from tests.helpers import losses
from tests.models.test_own_family import MODEL
from trainfw import backends, build_program, load_recipe, plan, train
from trainfw.backends import select
from trainfw.checking import check_program

RECIPE = {
    "name": "own",
    "model": MODEL,
    "data": {"source": "tests.own.pieces:rows", "sequence_length": 32, "validation_fraction": 0.2},
    "objective": {"name": "tests.own.pieces:Doubled", "options": {"factor": 3.0}},
    "optimizer": {"name": "tests.own.pieces:scaled_signs", "options": {"scale": 1.0}, "learning_rate": 1e-3},
    "train": {"steps": 4, "global_batch_size": 8, "log_every": 1, "validation_batches": 2, "remat": "full"},
}
ON_FOUR = {"parallel": {"fsdp": 2, "tensor": 2}}


@pytest.fixture
def as_toy(monkeypatch):
    for known in ("BACKENDS", "SIMULATED"):
        monkeypatch.setattr(select, known, dict(getattr(select, known)))
    backends.prepare(as_backend="tests.own.pieces:TOY")
    yield
    backends.prepare()


def test_all_together_on_four_devices(tmp_path, as_toy):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    four = train(load_recipe(file, ON_FOUR), run_dir=tmp_path / "four", devices=jax.devices()[:4])
    assert backends.current().name == "toy"
    one = train(load_recipe(file), run_dir=tmp_path / "one", devices=jax.devices()[:1])
    assert (four.step, one.step) == (4, 4)
    learnt = losses(tmp_path / "four")
    assert learnt == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert learnt[4] < learnt[1]


def test_all_together_are_planned_and_checked(tmp_path):
    chip = {"hardware": {"topology": "trn2.3xlarge"}, "train": {"compute_dtype": "bfloat16"}}
    recipe = load_recipe(RECIPE, ON_FOUR | chip)
    made = plan(recipe)
    assert made.time.seconds > 0
    assert made.analysis.unrecognised  # it has no attention, and the plan says so
    assert "attention: not recognised" in str(made)
    report = check_program(build_program(recipe, jax.devices()[:4]), topology=recipe.hardware.load())
    assert report.ok, str(report)
