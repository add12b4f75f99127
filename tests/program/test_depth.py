"""What is scanned is compiled once, however many layers there are; benchmarks/compile_time.py measures it."""

from __future__ import annotations

import pytest

from tests.helpers import tiny_recipe
from trainfw import build_program

LAYOUTS = {
    "prefetched": ("parallel={fsdp: 4, tensor: 2}", "train.remat=full", "train.accumulation_steps=2"),
    "context": ("parallel={fsdp: 2, context: 4}",),
    "pipeline": ("parallel={pipeline: 4, fsdp: 2}", "train.remat=dots"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_times_the_layers_are_the_same_program(layout, tmp_path):
    lines = []
    for num_layers in (8, 80):
        recipe = tiny_recipe(tmp_path, *LAYOUTS[layout], f"model.num_layers={num_layers}", "train.global_batch_size=16")
        program = build_program(recipe)
        lines.append(program.train_step.lower(program.abstract_state, program.abstract_batch).as_text().count("\n"))
    assert lines[1] == pytest.approx(lines[0], rel=0.01)
