"""What stands beside the package: the example script runs as it says, the recipes for Neuron check clean."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import quicker, write_recipe
from trainfw import UserError, train
from trainfw.models import FamilyConfig
from trainfw.parallel import AXES
from trainfw.recipe import bundled_recipes, load_recipe
from trainfw.training import tiny_overrides

# By name: a recipe that starts from weights cannot be loaded where the package that holds them is not installed.
FOR_NEURON = [name for name in bundled_recipes() if re.search("-(trn|inf)[0-9]", name)]
FOR_NEURON = [name for name in FOR_NEURON if load_recipe(name).hardware.topology]

ALIKE = {"llama2-7b-trn2-ultraserver", "qwen3-8b-trn2-ultraserver"}
"""Recipes that others are like, in layout and model."""
LARGEST = "llama3.1-405b-trn2-ultraservers"


def test_the_custom_loop_runs(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "custom_loop.py"
    output = subprocess.run(
        [sys.executable, str(script), str(write_recipe(tmp_path)), "train.steps=4"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "step 4: loss" in output
    assert "import " in output.splitlines()[-1]


@pytest.mark.parametrize("name", quicker(FOR_NEURON, [LARGEST]))
def test_recipes_for_neuron_check_clean(name):
    # Unrolled layers are compiled one by one, and are all alike: four say what all would, but for their memory.
    shallow = not load_recipe(name).train.scan_layers
    overrides = ["model.num_layers=4"] if shallow else []
    command = [sys.executable, "-m", "trainfw", "check", name, *overrides]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "clean: 0 errors" in result.stdout.splitlines()[-1]
    assert "GiB temporaries" in result.stdout


def _kind(model: FamilyConfig) -> object:
    """The kind of a model whose form is not another's."""
    return getattr(model, "conditioning", None) or model.moe is None


def form(name: str) -> tuple[object, ...]:
    """What of a recipe is left in its tiny version."""
    recipe = load_recipe(name)
    axes = [axis for axis in AXES if getattr(recipe.parallel, axis) != 1]
    return (*axes, recipe.parallel.interleave, _kind(recipe.model), recipe.train.scan_layers, recipe.train.remat)


@pytest.mark.long
@pytest.mark.parametrize("name", {form(name): name for name in FOR_NEURON if name not in ALIKE}.values())
def test_the_form_of_every_recipe_trains_on_eight_devices(name, tmp_path):
    write_recipe(tmp_path)  # for its text, which changes with nothing, and is learnt from the first steps
    text = [f"data.source={tmp_path}/text/*.txt"] * (not load_recipe(name).reads_images)
    tiny = [*tiny_overrides(load_recipe(name), 8), *text, "data.validation_fraction=0.2"]
    recipe = load_recipe(name, tiny)
    result = train(recipe, run_dir=tmp_path / "run")
    assert result.step == 5
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    kept = [axis for axis in AXES if getattr(recipe.parallel, axis) > 1]
    assert kept == [axis for axis in AXES if getattr(load_recipe(name).parallel, axis) != 1]


def test_a_tiny_recipe_takes_two_devices_an_axis():
    with pytest.raises(UserError, match=r"devices = 4 \(--devices\): pipeline \* fsdp \* tensor of two devices each"):
        tiny_overrides(load_recipe("llama3.1-405b-trn2-ultraservers"), 4)


def test_there_are_recipes_for_trn1_and_trn2():
    assert {
        "llama3.1-8b-trn1",
        "llama3.1-8b-trn2-ultraserver",
        "llama3.1-70b-trn2-ultraserver",
        "llama2-7b-trn2-ultraserver",
        "qwen3-8b-trn2-ultraserver",
        "llama3.1-405b-trn2-ultraservers",
        "llama3.1-8b-128k-trn2-ultraserver",
        "qwen3-30b-a3b-trn2-ultraserver",
    } <= {*FOR_NEURON}
