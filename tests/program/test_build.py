from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import PLAIN_EMITTERS, chip_of_halves, quicker, random_batches, tiny_recipe
from trainfw import UserError, backends, build_program
from trainfw.hlo import collectives_of, partition
from trainfw.objectives import Draw, Mean, NextToken


def one_step(recipe, devices=1):
    program = build_program(recipe, jax.devices()[:devices])
    state = program.init()
    return program, program.train_step(state, program.shard_batch(random_batches(recipe, 1)[0]))


def test_building_allocates_nothing(tmp_path):
    recipe = tiny_recipe(tmp_path, "model.preset=llama3.1-405b", "train.global_batch_size=8")
    program = build_program(recipe)
    assert program.num_parameters == 405_853_388_800
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(program.abstract_state))


def test_state_is_sharded_by_the_rules(tmp_path):
    program = build_program(tiny_recipe(tmp_path, "parallel.tensor=2"))
    state = program.init()
    up = state.params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * 8 == up.size  # fsdp 4 x tensor 2
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.shape == up.shape]
    assert len(moments) >= 2
    assert all(m.sharding == up.sharding for m in moments)


@pytest.mark.parametrize(
    ("stage", "split"),
    [("parameters", (True, True, True)), ("gradients", (False, True, True)), ("optimizer", (False, False, True))],
)
def test_fsdp_shards_what_the_recipe_says(stage, split, tmp_path):
    overrides = ("parallel={fsdp: 2, tensor: 2, fsdp_shards: %s}" % stage, "train.accumulation_steps=2")  # noqa: UP031
    program = build_program(tiny_recipe(tmp_path, *overrides), jax.devices()[:4])
    tables = [program.abstract_state.params["embedding"]["table"]]
    tables += [leaf for leaf in jax.tree.leaves(program.abstract_state.opt_state) if leaf.shape == tables[0].shape]
    assert len(tables) == 3
    held = [math.prod(table.sharding.shard_shape(table.shape)) / table.size for table in tables]
    assert held == [1 / 4 if split[0] else 1 / 2, 1 / 4, 1 / 4]

    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    partitioned = partition(lowered)
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(program.abstract_state)
    )
    batch = sum(math.prod(leaf.shape) * 4 // 2 for leaf in program.abstract_batch.values())
    assert partitioned.compiled.memory_analysis().argument_size_in_bytes == state + batch
    along = [c for c in collectives_of(partitioned.module) if c.axes(program.mesh) == ("fsdp",)]
    weights = program.recipe.model.num_layers * 7
    # Gathered in each microbatch, forward and backward, or once a step; scattered in each, or once. (The table, here
    # looked up in the dtype of the head, is gathered once for both.)
    gathers = [c for c in along if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == (2 * (2 * weights + 1) if split[0] else 7 + 1)
    scattered = [c for c in along if c.kind == "reduce-scatter"]
    assert sum(c.times for c in scattered) == (2 * (weights + 2) if split[1] else 7 + 1)


def test_the_state_is_donated(tmp_path):
    program = build_program(tiny_recipe(tmp_path), jax.devices()[:1])
    state = program.init()
    program.train_step(state, program.shard_batch(random_batches(program.recipe, 1)[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("layout", quicker([(), ("parallel.fsdp=4", "train.accumulation_steps=2")], [()]))
def test_without_donation_the_state_is_left_and_the_numbers_are_the_same(layout, tmp_path):
    after = []
    for donate in ("true", "false"):
        program = build_program(tiny_recipe(tmp_path, f"backend.donate={donate}", *layout), jax.devices()[:4])
        step, state = program.compile_train_step(), program.init()
        batches = [program.shard_batch(batch) for batch in random_batches(program.recipe, 2)]
        for batch in batches:
            before = state
            state, metrics = step(before, batch)
            assert {leaf.is_deleted() for leaf in jax.tree.leaves(before)} == {donate == "true"}
        if donate == "false":
            assert program.compile_train_step().memory_analysis().alias_size_in_bytes == 0
        after.append(jax.device_get((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_the_loss_is_the_mean_negative_log_likelihood_of_unmasked_targets(tmp_path):
    recipe = tiny_recipe(tmp_path)
    program = build_program(recipe, jax.devices()[:1])
    params, batch = program.init().params, random_batches(recipe, 1)[0]
    logits = program.model(params)(
        batch["tokens"], segment_ids_BS=batch["segment_ids"], positions_BS=batch["positions"]
    )
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    chosen = np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    expected = -(chosen * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    metrics = program.eval_step(params, {}, program.shard_batch(batch))
    assert metrics["loss"].value() == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"].count) == batch["loss_mask"].sum()


def test_z_loss_is_in_the_objective_and_not_in_the_metric(tmp_path):
    program = build_program(tiny_recipe(tmp_path), jax.devices()[:1])
    model, batch = program.model(program.init().params), random_batches(program.recipe, 1)[0]
    (plain, metrics), (with_z, metrics_z) = (
        NextToken(z_loss=z_loss).loss({"learner": model}, batch, Draw(training=True)) for z_loss in (0.0, 0.5)
    )
    log_z = jax.nn.logsumexp(
        model(batch["tokens"], segment_ids_BS=batch["segment_ids"], positions_BS=batch["positions"]), axis=-1
    )
    assert float(with_z - plain) == pytest.approx(0.5 * float((log_z**2 * batch["loss_mask"]).sum()), rel=1e-4)
    assert metrics["loss"].value() == metrics_z["loss"].value() == pytest.approx(float(plain / metrics["loss"].count))


def test_masked_tokens_have_no_influence(tmp_path):
    recipe = tiny_recipe(tmp_path)
    program = build_program(recipe, jax.devices()[:1])
    batch = random_batches(recipe, 1)[0]
    padded = batch["segment_ids"] == 0
    changed = dict(batch, tokens=np.where(padded, 7, batch["tokens"]), targets=np.where(padded, 9, batch["targets"]))
    losses = []
    for b in (batch, changed):
        _, metrics = program.train_step(program.init(), program.shard_batch(b))
        losses.append((metrics["loss"].value(), metrics["grad_norm"].value()))
    assert losses[0] == losses[1]


@pytest.mark.long
def test_bfloat16_computes_near_float32_and_keeps_float32_state(tmp_path):
    _, (_, reference) = one_step(tiny_recipe(tmp_path))
    _, (state, metrics) = one_step(tiny_recipe(tmp_path, "train.compute_dtype=bfloat16"))
    assert metrics["loss"].value() == pytest.approx(reference["loss"].value(), rel=0.01)
    assert metrics["grad_norm"].value() == pytest.approx(reference["grad_norm"].value(), rel=0.05)
    assert metrics["loss"].value() != reference["loss"].value()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("scan", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_remat_trades_memory_for_recomputation(scan, tmp_path):
    """What the compiled step says of itself: from none to full fewer temporary bytes, and more FLOPs.

    As many with "dots", but for activations and norms: the gate's are computed again with "none" too.
    """

    def cost(remat: str) -> tuple[float, int]:
        recipe = tiny_recipe(
            tmp_path,
            f"train.remat={remat}",
            "model.num_layers=8",
            "data.sequence_length=256",
            f"train.scan_layers={scan}",
        )
        compiled = build_program(recipe, jax.devices()[:1]).compile_train_step()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = cost("none"), cost("dots"), cost("full")
    assert 1.1 * dots[0] < full[0]
    assert dots[0] == pytest.approx(none[0], rel=0.05)
    assert none[1] > dots[1] > full[1]


def test_the_step_has_no_callback_no_cond_and_no_integer_reduction_over_devices(tmp_path):
    program = build_program(tiny_recipe(tmp_path, "parallel.tensor=2", "train.accumulation_steps=2"))
    jaxpr = str(jax.make_jaxpr(program.train_step)(program.abstract_state, program.abstract_batch))
    for primitive in ("callback", "cond[", "while[", "argmax"):
        assert primitive not in jaxpr, primitive
    compiled = program.compile_train_step().as_text()
    reductions = [line for line in compiled.splitlines() if " all-reduce(" in line or " reduce-scatter(" in line]
    assert reductions
    assert not [line for line in reductions if " s32[" in line or " u32[" in line]


def test_the_first_state_is_the_same_model_in_any_order_of_layers(tmp_path, monkeypatch):
    recipe, order = tiny_recipe(tmp_path, "model.num_layers=4", "optimizer.name=adafactor"), (0, 2, 1, 3)
    program = build_program(recipe, jax.devices()[:2])
    expected = program.init().params
    assert program.layer_order == (0, 1, 2, 3)
    assert program.in_true_order(expected) is expected
    monkeypatch.setattr("trainfw.program.fit.stage_order", lambda *_: order)
    program = build_program(recipe, jax.devices()[:2])
    params = program.init().params
    jax.tree.map(np.testing.assert_array_equal, program.in_true_order(params), expected)
    up = params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up[1], expected["layers"]["mlp"]["up"]["kernel"][2])


def test_the_first_state_is_the_same_bits_compiled_quickly(tmp_path, monkeypatch):
    program = build_program(tiny_recipe(tmp_path), jax.devices()[:1])

    def first(level):
        options = {"xla_backend_optimization_level": level}
        if PLAIN_EMITTERS:  # as users have them, where there are others
            options["xla_cpu_use_fusion_emitters"] = True
        backend = dataclasses.replace(backends.current(), init_options=options)
        with monkeypatch.context() as patch:
            patch.setattr(backends, "current", lambda: backend)
            return program.init().params

    jax.tree.map(np.testing.assert_array_equal, first("1"), first("3"))  # a run's, and XLA's own


def test_means_merge_by_their_counts():
    assert (Mean(6.0, 2.0) + Mean(0.0, 1.0)).value() == 2.0
    assert Mean(0.0, 0.0).value() == 0.0


def test_flops_per_step_count_the_matrices_six_times(tmp_path):
    program = build_program(tiny_recipe(tmp_path, "data.sequence_length=1"))
    model = program.recipe.model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    # With one token a row, attention adds next to nothing: its scores and values, for one key.
    attention = 12 * model.num_layers * model.num_heads * model.head_dim
    expected = 6 * (program.num_parameters - norms)
    assert program.flops_per_step / program.tokens_per_step == pytest.approx(expected, abs=attention)


def test_devices_are_placed_on_the_topology(tmp_path):
    on_a_chip = ["hardware={topology: %s, lnc: 1}" % chip_of_halves(tmp_path), "parallel.tensor=2"]  # noqa: UP031
    program = build_program(tiny_recipe(tmp_path, *on_a_chip), jax.devices()[::-1])  # however they are handed over
    assert program.placement is not None
    assert [device.id for device in program.mesh.devices.flat] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert program.placement.order.ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    traffic = "parallel.traffic={fsdp: 1.0e+12, tensor: 1.0}"
    assert build_program(tiny_recipe(tmp_path, *on_a_chip, traffic)).placement.seconds > program.placement.seconds


def test_a_layout_that_the_topology_cannot_take_is_refused_with_the_nearest(tmp_path):
    on_a_chip = ("hardware={topology: trn2.3xlarge, lnc: 1}", "parallel={fsdp: 2, context: 2, tensor: 2}")
    recipe = tiny_recipe(tmp_path, *on_a_chip)
    with pytest.raises(
        UserError, match=r"parallel: .*tensor = 2 cannot be legal.*Nearest: parallel.fsdp=1 parallel.ten"
    ):
        build_program(recipe, jax.devices())


def test_weights_are_gathered_in_the_compute_dtype(tmp_path):
    program = build_program(tiny_recipe(tmp_path, "train.compute_dtype=bfloat16", "parallel.tensor=2"))
    module = partition(program.train_step.lower(program.abstract_state, program.abstract_batch)).module
    gathers = [c for c in collectives_of(module) if c.kind == "all-gather" and c.axes(program.mesh) == ("fsdp",)]
    kernels = 7 * program.recipe.model.num_layers
    assert sum(c.times for c in gathers if c.dtype == "bf16") >= kernels
    # The embedding's table alone is read in f32, so that its gradient adds up in f32.
    table = program.recipe.model.vocab_size * program.recipe.model.hidden_size * 4 // 2
    assert {c.bytes for c in gathers if c.dtype == "f32"} <= {table}


def test_the_gradient_of_the_embedding_moves_no_whole_batch(tmp_path):
    """Where the batch spans two axes, the partitioner would replicate all of its activations for a scatter."""
    program = build_program(tiny_recipe(tmp_path, "parallel={data: 2, fsdp: 2, tensor: 2}"))
    module = partition(program.train_step.lower(program.abstract_state, program.abstract_batch)).module
    recipe = program.recipe
    batch = recipe.train.global_batch_size * recipe.data.sequence_length * recipe.model.hidden_size * 4
    assert max(c.bytes for c in collectives_of(module) if c.kind == "all-gather") < batch


def test_evaluation_does_not_depend_on_microbatches(tmp_path):
    found = []
    for accumulation in (1, 4):
        recipe = tiny_recipe(tmp_path, f"train.accumulation_steps={accumulation}")
        program = build_program(recipe, jax.devices()[:2])
        batch = program.shard_batch(random_batches(recipe, 1)[0])
        found.append(program.eval_step(program.init().params, {}, batch)["loss"])
    assert found[0].value() == pytest.approx(found[1].value(), rel=1e-6)
    assert float(found[0].count) == float(found[1].count)


@pytest.mark.long
def test_weights_cast_once_a_step_give_the_same_bits(tmp_path, monkeypatch):
    # As on a GPU; the router of a mixture of experts is used in float32.
    found = []
    for once in (False, True):
        backend = dataclasses.replace(backends.current(), casts_once=once)
        monkeypatch.setattr(backends, "current", lambda backend=backend: backend)
        moe = "model.moe={num_experts: 4, experts_per_token: 2}"
        overrides = ("train.accumulation_steps=2", "train.compute_dtype=bfloat16", moe)
        recipe = tiny_recipe(tmp_path, *overrides)
        program = build_program(recipe, jax.devices()[:1])
        step = program.train_step.lower(program.abstract_state, program.abstract_batch)
        state = program.init()
        for batch in random_batches(recipe, 2):
            state, _ = program.train_step(state, program.shard_batch(batch))
        found.append((step.as_text(), jax.tree.map(np.asarray, state.params)))
    (before, ours), (after, theirs) = found
    assert before != after
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.long
def test_unrolled_layers_of_microbatches_get_the_gradients_of_scanned_ones(tmp_path):
    found = []
    for scan in ("true", "false"):
        recipe = tiny_recipe(tmp_path, "train.accumulation_steps=4", f"train.scan_layers={scan}")
        program = build_program(recipe, jax.devices()[:1])
        batch = program.shard_batch(random_batches(recipe, 1)[0])
        found.append(program.gradients(program.init().params, {}, batch)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


def test_without_the_mask_a_token_sees_the_documents_before_its_own(tmp_path):
    recipe = tiny_recipe(tmp_path, "data.mask_documents=false")
    program = build_program(recipe, jax.devices()[:1])
    params, batch = program.init().params, random_batches(recipe, 1)[0]
    logits = program.model(params)(batch["tokens"], positions_BS=batch["positions"])
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], axis=-1)[..., 0]
    expected = -(log_p * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    found = program.eval_step(params, {}, program.shard_batch(batch))["loss"].value()
    assert found == pytest.approx(expected, rel=1e-5)
    masked = build_program(tiny_recipe(tmp_path), jax.devices()[:1])
    assert masked.eval_step(params, {}, masked.shard_batch(batch))["loss"].value() != pytest.approx(found, rel=1e-5)


def test_one_process_reads_the_whole_batch(tmp_path):
    assert build_program(tiny_recipe(tmp_path, "parallel.tensor=2")).batch_share == (0, 1)
