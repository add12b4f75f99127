"""Attention and the loss are found by their scopes, in whichever form they run, and never by an einsum's letters."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import tiny_recipe
from trainfw import build_program
from trainfw.cli.terminal import for_terminal
from trainfw.hlo import Module
from trainfw.parallel import Layout
from trainfw.planning import Analysis, plan
from trainfw.planning.read_step.analysis import compile_step, read
from trainfw.report import plan_page
from trainfw.scopes import ATTENTION, LOSS, LOSS_GRADIENT

ATTENDING = importlib.import_module("trainfw.models.common.attention")

FORMS: dict[str, tuple[list[str], float]] = {
    "plain": (["parallel.fsdp=2"], 2 + 4),
    "recomputed": (["parallel.fsdp=2", "train.remat=full", "train.accumulation_steps=2"], 2 + 2 + 4),
    "recomputed, unrolled": (["parallel.fsdp=2", "train.remat=full", "train.scan_layers=false"], 2 + 2 + 4),
    "pipeline": (["parallel.pipeline=2", "parallel.fsdp=1", "train.remat=full"], (2 + 2 + 4) * 9 / 8),
    "ring": (["parallel.context=2", "parallel.fsdp=1"], (2 + 5) * 5 / 8),
    "gathered": (["parallel.context=2", "parallel.context_attention=gathered", "parallel.fsdp=1"], (2 + 4) * 3 / 4),
    "blocks of the CPU": (["parallel.fsdp=1"], 2 + 5),
}
"""Overrides, and how many products of all queries and all keys a layer then takes: of 9 iterations of a stage that has
8 microbatches, one computes on nothing."""


@dataclass(frozen=True)
class Step:
    """A step that is compiled once, for a test to give its operations other names."""

    module: Module
    mesh: Any
    layout: Layout
    products: float

    def analysed(self, rename: Callable[[str], str] = lambda op_name: op_name) -> Analysis:
        computations = {
            name: replace(
                computation,
                instructions={n: replace(i, op_name=rename(i.op_name)) for n, i in computation.instructions.items()},
            )
            for name, computation in self.module.computations.items()
        }
        return read(replace(self.module, computations=computations), self.mesh, self.layout)


def compiled_step(recipe: Any, products: float, *, stands_in: bool = True) -> Step:
    layout = recipe.parallel
    devices = jax.devices()[: layout.pipeline * layout.context * layout.fsdp]
    program = build_program(recipe, devices, stands_in=stands_in)
    return Step(compile_step(program).module, program.mesh, program.layout, products)


@pytest.fixture(scope="module", params=FORMS)
def step(request, tmp_path_factory) -> Step:
    overrides, products = FORMS[request.param]
    recipe = tiny_recipe(tmp_path_factory.mktemp("form"), *overrides)
    return compiled_step(recipe, products, stands_in=request.param != "blocks of the CPU")


def test_every_form_of_attention_is_found(step):
    found = step.analysed()
    assert found.unrecognised == ()
    layers, rows, heads, length, width = 2, 8, 4, 32, 16
    devices = step.layout.fsdp * step.layout.context * step.layout.pipeline
    flops = devices * sum(matmul.flops for matmul in found.matmuls if matmul.attention)
    assert flops == step.products * layers * rows * heads * 2 * length * length * width
    assert found.streamed_bytes("attention") > 0


def test_letters_of_einsums_are_not_read(step):
    assert any("bkgst" in i.op_name for i, _ in step.module.instructions())
    assert step.analysed(lambda op_name: re.sub(r"[a-z]+,[a-z]+->[a-z]+", "x,y->z", op_name)) == step.analysed()


@pytest.mark.parametrize(("gone", "missed"), [(ATTENTION, {ATTENTION}), (LOSS, {LOSS})])
def test_a_part_without_its_scope_is_not_passed_over(step, gone, missed):
    full, found = step.analysed(), step.analysed(lambda op_name: re.sub(rf"\b{gone}\b", "another", op_name))
    assert set(found.unrecognised) == missed
    assert found.flops == full.flops
    assert (found.streamed_bytes("attention") == 0) == (gone == ATTENTION)


def test_products_of_the_losss_gradient_are_told_from_the_forward_ones(step):
    """All of it is computed in the forward pass: the logits, and from them the gradients of activations and head."""

    def of_loss(found: Analysis) -> list[bool]:
        return sorted(m.backward for m in found.matmuls if 258 in (m.m, m.n, m.k) and m.phase == "forward")

    assert of_loss(step.analysed()) == [False, True, True]
    unnamed = step.analysed(lambda op_name: op_name.replace(LOSS_GRADIENT, "another"))
    assert of_loss(unnamed) == [False, False, False]


def renamed_attend(q_BSHh, k_BTKh, v_BTKh, mask_BST, *, scale, softcap=None):
    """`attend` in other letters."""
    B, S, H, h = q_BSHh.shape
    q_BSKGh = q_BSHh.reshape(B, S, k_BTKh.shape[2], -1, h)
    scores_BKGST = ATTENDING.capped(ATTENDING.wide_einsum("acdef,agdf->adecg", q_BSKGh, k_BTKh) * scale, softcap)
    weights_BKGST = jax.nn.softmax(jnp.where(mask_BST[:, None, None], scores_BKGST, -1e30), axis=-1)
    return jnp.einsum("adecg,agdf->acdef", weights_BKGST.astype(v_BTKh.dtype), v_BTKh).reshape(B, S, H, h)


def test_attend_in_other_letters_has_the_same_analysis(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, "parallel.fsdp=2")
    before = compiled_step(recipe, 6).analysed()
    monkeypatch.setattr(ATTENDING, "attend", renamed_attend)
    after = compiled_step(recipe, 6)
    assert not any("bkgst" in i.op_name for i, _ in after.module.instructions())
    assert after.analysed() == before


def test_a_plan_says_what_it_did_not_recognise(tmp_path, monkeypatch):
    monkeypatch.setattr(ATTENDING, "ATTENTION", "mine")
    made = plan(tiny_recipe(tmp_path, "hardware.topology=trn2.3xlarge", "train.compute_dtype=bfloat16"), fresh=True)
    (note,) = made.to_json()["unrecognised"]
    assert note.startswith(f"attention: not recognised: no matrix product is in a scope named {ATTENTION}; ")
    assert str(made).splitlines()[2] == note
    assert not any("attention" in text for text in made.time.assumptions)
    assert max(map(len, for_terminal(str(made), 80, colour=False).split("\n"))) <= 80
    assert note in plan_page(made)


def test_a_model_without_attention_is_planned_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(ATTENDING.Attention, "__call__", lambda self, x_BSD, context, kind, cache=None: (x_BSD, cache))
    recipe = tiny_recipe(tmp_path, "parallel.fsdp=1")
    found = compiled_step(recipe, 0).analysed()
    assert found.unrecognised == (ATTENTION,)
    assert not any(matmul.attention for matmul in found.matmuls)
    assert found.flops > 0
