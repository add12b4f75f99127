"""What stands beside the package: the example script runs as it says, the recipes for Neuron check clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_recipe
from trainfw.recipe import bundled_recipes, load_recipe

FOR_NEURON = [name for name, path in bundled_recipes().items() if load_recipe(path).hardware.topology]
ALL_LAYERS = "llama3.1-8b-trn1"
"""The unrolled recipe with the least memory for a core."""


@pytest.mark.slow
def test_the_custom_loop_runs(tmp_path):
    script = Path(__file__).parent.parent / "recipes" / "custom_loop.py"
    output = subprocess.run(
        [sys.executable, str(script), str(write_recipe(tmp_path)), "train.steps=4"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "step 4: loss" in output
    assert "import " in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_NEURON)
def test_recipes_for_neuron_check_clean(name):
    # Unrolled layers are compiled one by one, and are all alike: four say what all would, but for their memory, and
    # all of one recipe are checked.
    shallow = not load_recipe(name).train.scan_layers and name != ALL_LAYERS
    overrides = ["model.num_layers=4"] if shallow else []
    command = [sys.executable, "-m", "trainfw", "check", name, *overrides]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "clean: 0 errors" in result.stdout.splitlines()[-1]
    assert "GiB temporaries" in result.stdout


def test_there_are_recipes_for_trn1_and_trn2():
    assert {
        "llama3.1-8b-trn1",
        "llama3.1-8b-trn2-ultraserver",
        "llama3.1-70b-trn2-ultraserver",
        "llama2-7b-trn2-ultraserver",
        "qwen3-8b-trn2-ultraserver",
    } <= {*FOR_NEURON}
