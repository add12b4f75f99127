"""Few arrays, however many layers: others measured 418 ms for a call with 512 small ones on Neuron, 8 ms with 128."""

from __future__ import annotations

import jax
import pytest

from tests.helpers import tiny_recipe
from trainfw import build_program


@pytest.mark.parametrize("scan", ["true", "false"])
def test_a_steps_arguments_do_not_grow_with_the_layers(scan, tmp_path):
    def arguments(layers: int) -> int:
        recipe = tiny_recipe(tmp_path, f"model.num_layers={layers}", f"train.scan_layers={scan}")
        program = build_program(recipe)
        return len(jax.tree.leaves((program.abstract_state, program.abstract_batch)))

    assert arguments(2) == arguments(16) < 128
