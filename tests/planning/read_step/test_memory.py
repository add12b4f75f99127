"""Memory of one core: what adds up, what is counted by hand, and what the compiler of the real run says."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import pytest

from tests.helpers import quicker, tiny_recipe
from trainfw import backends, load_recipe
from trainfw.backends import load_sdk
from trainfw.hardware import load_topology
from trainfw.hlo import Partitioned, partition
from trainfw.parallel import Layout
from trainfw.planning import MemoryTable
from trainfw.planning.predict.closed_form import closed_memory
from trainfw.planning.read_step.memory import memory_table
from trainfw.program import build_program

MODELS = {
    "scanned": ("train.remat=full", "train.accumulation_steps=2", "train.global_batch_size=16"),
    "unrolled": ("train.scan_layers=false", "model.num_layers=3", "optimizer.name=muon"),
    "untied": ("model.tie_embeddings=false", "train.remat=dots", "model.qk_norm=true"),
}
LAYOUTS = {
    "fsdp": ("parallel.fsdp=8",),
    "fsdp-tensor": ("parallel.fsdp=4", "parallel.tensor=2"),
    "data-tensor": ("parallel.data=4", "parallel.fsdp=1", "parallel.tensor=2"),
}
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""XLA's defaults, which tests turn off."""
# No two dims alike: what is what shows in its shape.
SHAPE = (
    *("model.hidden_size=48", "model.intermediate_size=160", "model.num_heads=6", "model.num_kv_heads=2"),
    *("model.head_dim=8", "model.vocab_size=272", "model.num_layers=10", "data.sequence_length=36"),
)
LAYERS, WIDTH, VOCABULARY, LENGTH = 10, 48, 272, 36


def compiled_step(tmp_path, *overrides):
    program = build_program(tiny_recipe(tmp_path, *overrides), jax.devices())
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    return program, partition(lowered, backends.current().compiler_options)


def needed(compiled):
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def check_sums(table):
    assert all(size >= 0 for size in table.categories.values())
    json = table.to_json()
    assert json.pop("total") == sum(json.values()) == table.total
    assert table.total == table.arguments + table.temporaries + table.categories["runtime"]


@pytest.mark.parametrize(
    "overrides",
    quicker(
        [LAYOUTS["fsdp-tensor"], ("adapter={rank: 4, base: float32}", "parallel.fsdp=4", "parallel.data=2")],
        [LAYOUTS["fsdp-tensor"]],
    ),
)
def test_without_donation_the_state_is_held_twice(tmp_path, overrides):
    overrides = (*SHAPE, "train.global_batch_size=16", *overrides)
    tables = []
    for donate in ("true", "false"):
        program, partitioned = compiled_step(tmp_path, *overrides, f"backend.donate={donate}")
        table = memory_table(program, partitioned)
        check_sums(table)
        assert table.total == needed(partitioned.compiled)
        tables.append(table)
    donated, kept = tables
    state = sum(array.bytes_on(program.layout) for array in kept.state)
    assert "state_out" not in donated.categories
    assert "state written anew" not in str(donated)
    # What the compiler writes: the state, the metrics and a table of pointers to them.
    written = partitioned.compiled.memory_analysis().output_size_in_bytes
    assert kept.categories["state_out"] == state <= written <= state + 4096
    assert "state written anew" in str(kept)
    assert kept.arguments == donated.arguments
    longer = replace(program.layout, fsdp=2 * program.layout.fsdp)
    lengthened = kept.lengthened(program.layout, longer)
    check_sums(lengthened)
    assert lengthened.categories["state_out"] == sum(array.bytes_on(longer) for array in kept.state)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=[] if (i, j) == (0, 1) else pytest.mark.long)
        for i, model in enumerate(MODELS)
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_the_table_is_what_the_run_takes(tmp_path, model, layout):
    program, partitioned = compiled_step(tmp_path, *MODELS[model], *LAYOUTS[layout])
    table = memory_table(program, partitioned)
    check_sums(table)
    assert table.arguments == partitioned.compiled.memory_analysis().argument_size_in_bytes
    assert table.corrected_bytes == table.corrected_values == 0  # all f32
    assert table.total == needed(partitioned.compiled)
    # `partition` leaves LLVM's optimizations out; a run does not.
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    run = lowered.compile(compiler_options={**backends.current().compiler_options, **OPTIMIZED})
    assert table.total == pytest.approx(needed(run), rel=0.05)
    # Most of it is known for what it is.
    assert table.categories["other"] < 0.35 * table.total


def test_state_is_counted_by_its_shards(tmp_path):
    program, partitioned = compiled_step(tmp_path, *SHAPE, *LAYOUTS["fsdp-tensor"])
    sizes = memory_table(program, partitioned).categories
    heads, kv_heads, mlp = 6 * 8, 2 * 8, 160
    matrices = LAYERS * WIDTH * (2 * heads + 2 * kv_heads + 3 * mlp) + VOCABULARY * WIDTH
    norms = (2 * LAYERS + 1) * WIDTH  # on every device
    parameters = 4 * (matrices // 8 + norms)
    assert sizes["parameters"] == parameters
    counts = 4 * 2  # of Adam and of the schedule
    assert sizes["optimizer_state"] == 2 * parameters + counts


def test_what_the_step_never_reads_is_held_too(tmp_path):
    program, partitioned = compiled_step(tmp_path, *LAYOUTS["fsdp"], "data.mask_documents=false")
    table = memory_table(program, partitioned)
    check_sums(table)
    segment_ids = 8 // 8 * 32 * 4
    assert table.arguments - partitioned.compiled.memory_analysis().argument_size_in_bytes == segment_ids


def saved_activations(table: MemoryTable) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    return sum(value.bytes for value in table.largest if value.saved and value.category == "activations")


def test_activations_are_the_inputs_of_layers_with_full_remat(tmp_path):
    overrides = (*SHAPE, *LAYOUTS["fsdp-tensor"], "train.remat=full", "train.global_batch_size=8")
    program, partitioned = compiled_step(tmp_path, *overrides)
    table = memory_table(program, partitioned)
    rows = 8 // 4
    inputs = LAYERS * rows * (LENGTH // 2) * WIDTH * 4  # split over tensor
    stacks = [held for held in table.largest if held.saved and math.prod(held.dims) == inputs // 4]
    assert [(held.category, held.bytes) for held in stacks] == [("activations", inputs)]
    assert inputs <= saved_activations(table) <= table.categories["activations"]


@pytest.mark.long
def test_without_remat_the_backward_pass_finds_all_it_needs(tmp_path):
    saved = []
    for remat in ("full", "dots", "none"):
        program, partitioned = compiled_step(tmp_path, *SHAPE, *LAYOUTS["fsdp-tensor"], f"train.remat={remat}")
        saved.append(saved_activations(memory_table(program, partitioned)))
    assert saved[0] < saved[1] < saved[2]
    assert saved[2] > 5 * saved[0]


def test_logits_are_recognised(tmp_path):
    shape = (*SHAPE, "model.num_layers=1", "model.vocab_size=4096")
    program, partitioned = compiled_step(tmp_path, *shape, *LAYOUTS["fsdp-tensor"])
    table = memory_table(program, partitioned)
    logits = 2 * LENGTH * (4096 // 2) * 4
    found = [held.bytes for held in table.largest if held.category == "logits_and_loss"]
    assert found
    assert set(found) == {logits}
    assert table.categories["logits_and_loss"] == logits * len(found)


def test_gradients_and_gathered_weights_are_recognised(tmp_path):
    # Accumulated gradients are one more copy of the parameters; those of a microbatch at most another.
    program, partitioned = compiled_step(tmp_path, *SHAPE, *LAYOUTS["fsdp"], *MODELS["scanned"])
    table = memory_table(program, partitioned)
    whole_norms = 4 * (2 * LAYERS + 1) * WIDTH  # before they are scattered
    assert 0 < table.categories["gradients"] <= 2 * (table.categories["parameters"] + whole_norms)
    shards = {
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(program.abstract_state.params)
    }
    assert any(held.category == "gradients" and math.prod(held.dims) in shards for held in table.largest)
    # The gathered embedding is a whole table, and so is its gradient before it is scattered.
    whole = [held for held in table.largest if held.bytes == VOCABULARY * WIDTH * 4]
    assert {held.category for held in whole} == {"collective_buffers"}
    assert any("transpose(jvp(jit(_take)))" in held.op_name for held in whole)


@pytest.mark.parametrize(("stage", "parts"), [("gradients", 8), ("optimizer", 1)])
def test_gradients_of_whole_parameters_are_recognised(tmp_path, stage, parts):
    overrides = (*SHAPE, *LAYOUTS["fsdp"], *MODELS["scanned"], f"parallel.fsdp_shards={stage}")
    program, partitioned = compiled_step(tmp_path, *overrides)
    table = memory_table(program, partitioned)
    check_sums(table)
    sizes = [math.prod(leaf.shape) // parts for leaf in jax.tree.leaves(program.abstract_state.params)]
    found = {math.prod(held.dims) for held in table.largest if held.category == "gradients"}
    assert found & set(sizes)
    assert table.categories["parameters"] == 4 * sum(sizes) * parts
    assert 0 < table.categories["gradients"] <= 2 * 4 * (sum(sizes) + (2 * LAYERS + 1) * WIDTH)


@pytest.mark.long
def test_what_the_cpu_widens_counts_as_asked_for(tmp_path):
    overrides = (*SHAPE, *LAYOUTS["fsdp-tensor"], "train.remat=full", "train.compute_dtype=bfloat16")
    program, partitioned = compiled_step(tmp_path, *overrides)
    table = memory_table(program, partitioned)
    check_sums(table)
    assert table.corrected_values > 0
    assert table.corrected_bytes > 0
    assert table.compiled_temporaries - table.corrected_bytes == table.temporaries
    assert table.arguments + table.compiled_temporaries == needed(partitioned.compiled)
    inputs = LAYERS * 2 * (LENGTH // 2) * WIDTH
    stacks = [held for held in table.largest if math.prod(held.dims) == inputs]
    assert [held.bytes for held in stacks] == [2 * inputs]  # bf16, and no copy in f32 beside it
    assert stacks[0].saved
    assert f"{table.corrected_values} values that it widens" in str(table)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return compiled_step(tmp_path_factory.mktemp("small"), *LAYOUTS["fsdp"])


@pytest.mark.parametrize(
    ("name", "sdk", "parameters", "runtime", "label"),
    [
        ("trn2.48xlarge", "2.32", {}, 2 * 96e6, "runtime, SDK 2.32"),
        ("trn2.48xlarge", "2.33", {}, 2 * 160e6, "runtime, SDK 2.33"),  # two physical cores a logical one
        ("trn1.32xlarge", "2.33", {}, 160e6, "runtime, SDK 2.33"),
        ("trn2.48xlarge", "2.33", {"chip.core_overhead": "96 MB"}, 2 * 96e6, "runtime, SDK 2.33"),
        ("h100-8", "2.33", {}, 0, "runtime "),
    ],
)
def test_capacity_and_runtime_are_the_hardwares(small, name, sdk, parameters, runtime, label):
    program, partitioned = small
    topology = load_topology(name, parameters=parameters)
    table = memory_table(program, partitioned).on(topology, load_sdk(sdk))
    check_sums(table)
    assert table.categories["runtime"] == runtime
    assert table.capacity == topology.hbm_size
    assert table.headroom == topology.hbm_size - table.total
    assert table.total == needed(partitioned.compiled) + runtime
    rows = str(table).splitlines()
    assert [row.split("  ")[0] for row in rows[-3:-1]] == ["total", "headroom"]
    assert any(row.startswith(label) for row in rows)


def test_a_recipe_chooses_the_sdk_whose_runtime_counts():
    def runtime(*overrides: str) -> int:
        recipe = load_recipe("llama3.1-8b-trn2-ultraserver", overrides)
        topology = recipe.hardware.load()
        assert topology is not None
        return closed_memory(recipe, Layout.resolve(recipe.parallel, topology.cores), topology)["runtime"]

    assert runtime("hardware.sdk=2.32") == 192e6
    assert runtime("hardware.sdk=2.33") == runtime() == 320e6


def test_without_an_assignment_temporaries_are_other(small):
    program, partitioned = small
    table = memory_table(program, Partitioned(partitioned.module, partitioned.compiled))
    check_sums(table)
    assert not table.split
    assert table.total == needed(partitioned.compiled)
    assert table.categories["activations"] == table.corrected_bytes == 0
    assert "all count as other" in str(table)
