"""Several processes train as one does: the same program, each process reading its own share of the batch."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests.helpers import in_two_processes, random_batches
from trainfw import build_program, load_recipe

RECIPE = """
name: processes
model: {preset: tiny, vocab_size: 64, num_heads: 8, num_kv_heads: 8, head_dim: 4, num_layers: 2}
data: {sequence_length: 32}
train: {steps: 3, global_batch_size: 8}
"""

WORKER = """
import json, os, sys
from trainfw import backends, load_recipe
recipe = load_recipe(sys.argv[1], sys.argv[2:])
backends.connect(backends.prepare(4, hardware=recipe.hardware))
import jax
from tests.helpers import in_two_processes, random_batches
from trainfw import build_program
program = build_program(recipe)
share, shares = program.batch_share
state, losses = program.init(), []
for batch in random_batches(recipe, recipe.train.steps):
    rows = len(batch["tokens"]) // shares
    mine = {name: array[share * rows : (share + 1) * rows] for name, array in batch.items()}
    state, metrics = program.train_step(state, program.shard_batch(mine))
    losses.append(metrics["loss"].value())
print(json.dumps({"share": [share, shares], "losses": losses}))
"""

# What each of the two processes reads.
LAYOUTS = {
    "each its half": (["parallel={fsdp: 2, tensor: 4}"], [[0, 2], [1, 2]]),
    "both the same rows": (["parallel={fsdp: 1, tensor: 8}"], [[0, 1], [0, 1]]),
    "placed": (["hardware={topology: h100-8}", "parallel={data: 2, fsdp: 4}"], [[0, 2], [1, 2]]),
}


@pytest.mark.parametrize(
    "name", ["each its half", *(pytest.param(n, marks=pytest.mark.long) for n in list(LAYOUTS)[1:])]
)
@pytest.mark.long
def test_two_processes_train_as_one(name, tmp_path):
    overrides, shares = LAYOUTS[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, overrides)
    program = build_program(recipe)
    state, expected = program.init(), []
    for batch in random_batches(recipe, recipe.train.steps):
        state, metrics = program.train_step(state, program.shard_batch(batch))
        expected.append(metrics["loss"].value())

    both = in_two_processes(WORKER, path, *overrides)
    for process in both:
        assert process.returncode == 0, process.stderr
    found = [json.loads(process.stdout.splitlines()[-1]) for process in both]
    assert [result["share"] for result in found] == shares
    for result in found:
        np.testing.assert_allclose(result["losses"], expected, rtol=3e-6)
    assert jax.process_count() == 1
