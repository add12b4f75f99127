from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest

from tests.helpers import tiny_recipe, write_recipe
from trainfw import UserError
from trainfw.models import flops_per_token
from trainfw.models.layer_stack import Remat
from trainfw.planning import plan, simulated_cores

ON_A_CHIP = ["hardware={topology: trn2.3xlarge, dollars_per_chip_hour: 2.0}", "train.compute_dtype=bfloat16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return plan(tiny_recipe(tmp_path_factory.mktemp("plan"), *ON_A_CHIP, "train.accumulation_steps=2"))


def test_a_plan_is_of_the_whole_recipe(made):
    assert made.layout.sizes["fsdp"] == 4
    assert made.units_per_step == 8 * 32
    assert made.units_per_second == pytest.approx(made.units_per_step / made.time.seconds)
    peak = 4 * 667e12 / 4
    flops = flops_per_token(made.recipe.model, 32) * made.units_per_step
    assert made.mfu == pytest.approx(flops / made.time.seconds / peak)
    assert made.chip_hours == pytest.approx(8 * made.time.seconds / 3600)
    assert made.dollars == pytest.approx(2 * made.chip_hours)
    assert made.time.low <= made.time.seconds <= made.time.high


def test_json_has_the_promised_keys_and_adds_up(made):
    found = json.loads(json.dumps(made.to_json()))
    promised = {
        *("step_time_seconds", "step_time_range_seconds", "tokens_per_second", "mfu", "bound_by", "remat"),
        *("memory_bytes_per_core", "collectives", "layout", "hardware", "assumptions"),
    }
    assert promised <= found.keys()
    memory = found["memory_bytes_per_core"]
    assert sum(size for key, size in memory.items() if key != "total") == memory["total"]
    assert sum(found["step_time_parts_seconds"].values()) == pytest.approx(found["step_time_seconds"])
    assert {"fsdp"} <= {axis for row in found["collectives"] for axis in row["axes"]}
    assert found["hardware"] == {"topology": "trn2.3xlarge", "count": 1, "lnc": 2, "chips": 1, "cores": 4}


def test_the_text_says_what_it_is(made):
    text = str(made)
    assert "A prediction: nothing here was measured on this hardware." in text
    assert "tiny on trn2.3xlarge: 1 chip, 4 cores, fsdp(4)" in text.splitlines()[0]
    for part in ("where a step goes", "memory of a core", "links busy: core", "assumed"):
        assert part in text
    assert "microbatches twice as large (train.accumulation_steps=1)" in text
    assert "\nremat       none: " in text
    assert "\n  runtime, SDK 2.33 " in text


@pytest.mark.parametrize("remat", get_args(Remat))
def test_the_text_says_which_remat_it_prices(made, remat):
    recipe = made.recipe.model_copy(update={"train": made.recipe.train.model_copy(update={"remat": remat})})
    assert f"\nremat       {remat}: the backward pass computes " in str(replace(made, recipe=recipe))


def test_a_pipelines_bubble_is_reported(tmp_path):
    """Two stages of two chunks, four microbatches: 9 iterations, of which a stage has work in 8."""
    made = plan(
        tiny_recipe(
            tmp_path,
            *("hardware.topology=h100-8", "parallel={pipeline: 2, interleave: 2, fsdp: 2, tensor: 2}"),
            *("model.num_layers=4", "train.remat=full", "train.compute_dtype=bfloat16"),
        )
    )
    assert made.bubble == made.to_json()["pipeline_bubble"] == pytest.approx(1 / 9)
    assert "bubble      11.1%" in str(made)
    assert {loop.times for loop in made.analysis.loops} <= {9}
    ring = [t for t in made.analysis.transfers if t.kind == "collective-permute"]
    assert ring
    assert {t.axes for t in ring} == {("pipeline",)}
    # All iterations are in its products: forward and backward, an eighth more than of one stage.
    flops = sum(m.flops for m in made.analysis.matmuls if m.attention and m.phase == "forward")
    rows, heads, layers = 8 // (2 * 2), 4 // 2, 4
    once = 2 * 2 * rows * heads * made.recipe.model.head_dim * 32**2 * layers
    assert flops == pytest.approx(once * 9 / 8)


def test_replicas_are_compiled_two_at_a_time(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        "hardware={topology: trn2-ultraserver, count: 64}",
        "parallel={data: 64, fsdp: 64, tensor: 4}",
        "train.global_batch_size=4096",
    )
    assert simulated_cores(recipe) == 2 * 256


def test_what_cannot_be_planned_is_said_before_anything_is_compiled(tmp_path):
    with pytest.raises(UserError, match=r"hardware\.topology = null: a plan needs hardware"):
        simulated_cores(tiny_recipe(tmp_path))
    with pytest.raises(UserError, match="let data or fsdp be longer"):
        simulated_cores(
            tiny_recipe(tmp_path, "hardware={topology: trn2-ultraserver, count: 64}", "parallel={fsdp: 1, tensor: -1}")
        )


@pytest.mark.long
def test_as_typed(tmp_path):
    recipe = str(write_recipe(tmp_path, hardware={"topology": "trn2.48xlarge"}, train={"global_batch_size": 64}))
    command = [sys.executable, "-m", "trainfw", "plan", recipe]
    found = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert found["hardware"]["cores"] == 64
    refused = subprocess.run([*command, "hardware={}"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "hardware.topology" in refused.stderr
    assert "Traceback" not in refused.stderr
