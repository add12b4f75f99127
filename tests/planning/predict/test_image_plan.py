"""Plans of models of images: counted in images, attention that is not causal, the loss found, drawing."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import trainfw
from trainfw import UserError, build_program, load_recipe
from trainfw.backends import simulated
from trainfw.hardware import load_topology
from trainfw.planning import DRAWING_STEPS, Matmul, plan, plan_program_function, step_time, survey, whatif
from trainfw.planning.predict.step_time import Assumptions
from trainfw.planning.read_step.analysis import simulation
from trainfw.planning.read_step.compile_cache import _key
from trainfw.report import plan_page

CHIP = "trn2.3xlarge"


def recipe_of(*overrides: str):
    tree = {
        "name": "pictures",
        "hardware": {"topology": CHIP},
        "model": {
            "family": "dit",
            "image_size": 32,
            "channels": 4,
            "patch_size": 2,
            "hidden_size": 64,
            "num_layers": 3,
            "num_heads": 4,
            "conditioning": "class",
            "num_classes": 5,
        },
        "data": {"format": "images", "source": "pictures"},
        "objective": {"name": "ddpm"},
        "train": {"global_batch_size": 8, "compute_dtype": "bfloat16"},
    }
    return load_recipe(tree, overrides)


@pytest.fixture(scope="module")
def made():
    return plan(recipe_of())


def test_a_plan_counts_images(made):
    assert (made.unit, made.units_per_step) == ("image", 8)
    found = made.to_json()
    assert found["images_per_step"] == 8
    assert found["images_per_second"] == pytest.approx(8 / made.time.seconds)
    assert not any(key.startswith("tokens") for key in found)
    flops = 8 * made.recipe.sequence_length * trainfw.models.flops_per_token(made.recipe.model, 256)
    assert made.mfu == pytest.approx(flops / made.time.seconds / 667e12)
    text, page = str(made), plan_page(made, whatif(made))
    assert "images/s" in text
    assert "images: " in text
    for words in (text, page):
        assert not re.search(r"tokens/s|[GM] tokens", words)
    assert not any("mask_documents" in change for change, _ in whatif(made))


def test_attention_and_loss_are_found(made):
    assert made.unrecognised == []
    # A core has 2 rows of 4 heads; of 6 products with scores two are forward.
    scores = [m for m in made.analysis.matmuls if m.attention]
    assert sum(m.flops for m in scores) == 3 * 6 * 2 * (2 * 4) * 256 * 256 * 16
    assert {loop.phase for loop in made.analysis.loops} == {"forward", "backward"}  # not taken for a loss's chunks
    # Of 256 x 256 scores a row and head, and of no queries, keys or values.
    arrays = {piece.array for piece in made.analysis.streamed if piece.kind == "attention"}
    assert arrays <= {2 * 4 * 256 * 256 * size for size in (2, 4)}


def test_a_fused_kernel_computes_all_of_attention_that_is_not_causal(made):
    product = Matmul(1, 4096, 4096, 128, "bf16", 1, attention=True)
    for part, share in ((product, 1.0), (replace(product, backward=True), 5 / 4)):
        analysis = replace(made.analysis, matmuls=(part,), streamed=())
        plain, fused = (
            step_time(analysis, made.placement, made.recipe, Assumptions(attention=how)).products[0]
            for how in ("xla", "fused")
        )
        assert fused / plain == pytest.approx(share)
    assert not any("fused" in text for text, _ in whatif(made))  # on Neuron none is called
    said = step_time(made.analysis, made.placement, made.recipe, Assumptions(attention="fused")).assumptions
    assert any("trainfw calls none for attention that is not causal" in text for text in said)


def test_recipes_of_other_images_are_compiled_anew():
    recipes = [recipe_of(), recipe_of("model.image_size=16"), recipe_of("model.num_classes=6"), recipe_of()]
    first, *others, again = (_key(simulation(recipe), simulated("neuron")) for recipe in recipes)
    assert first == again
    assert len({first, *others}) == 3


def test_drawing_is_planned_as_its_function():
    topology = load_topology(CHIP)
    program = build_program(recipe_of(), jax.devices()[:4])
    drawn = plan_program_function(program, "denoise", topology)
    assert (drawn.rows, drawn.steps) == (8, DRAWING_STEPS)
    assert drawn.images_per_second == pytest.approx(8 / 20 / drawn.time.seconds)
    twice = plan_program_function(program, "denoise", topology, steps=40)
    assert twice.to_json()["images_per_second"] == pytest.approx(drawn.images_per_second / 2)
    assert "images/s, drawn in 40 runs each" in str(twice)
    # Both rows of guidance: 3 layers, 2 products with scores.
    scores = [m for m in drawn.matmuls if m.attention]
    assert sum(m.flops for m in scores) == 3 * 2 * 2 * (2 * 2 * 4) * 256 * 256 * 16
    assert drawn.time.parts["attention"] > 0
    evaluated = plan_program_function(program, "evaluate", topology)
    assert "images_per_second" not in evaluated.to_json()
    with pytest.raises(UserError, match=r"function 'denoize': .* has train, evaluate, denoise; did you mean 'denoise'"):
        plan_program_function(program, "denoize", topology)


def test_a_search_says_why_it_has_nothing_to_go_by():
    with pytest.raises(UserError, match=r"model\.family = 'dit': this family does not give the shapes"):
        survey(recipe_of())


def test_layers_of_a_stack_are_read_where_they_lie():
    """Each layer's weights are read by its product alone, and the residual stream is written once a layer."""

    def unrolled(stacked, x):
        for i in range(stacked.shape[0]):
            x = x + jnp.tanh(x @ stacked[i])
        return x

    def scanned(stacked, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, stacked)[0]

    weights, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((6, 1024, 1024), (8, 1024)))
    for fn in (unrolled, scanned):
        found = trainfw.plan(fn, weights, x, hardware="inf2.xlarge").time.parts
        assert found["matmul"] == pytest.approx(6 * 2 * (1024 * 1024 + 2 * 8 * 1024) / (820 * 2**30 / 2))
        assert found["memory"] < 0.05 * found["matmul"]
