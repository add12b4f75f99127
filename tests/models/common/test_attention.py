"""Attention through the kernel registry: a kernel sees one device's shapes, and gives what the XLA form gives."""

from __future__ import annotations

import jax
import pytest

from tests.helpers import random_batches, tiny_recipe
from trainfw import build_program
from trainfw.backends import kernels
from trainfw.models.common.attention import attend

LAYOUTS = {"one device": (1, "parallel={}"), "data 2, fsdp 2, tensor 2": (8, "parallel={data: 2, fsdp: 2, tensor: 2}")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["global", "sliding"])
def test_a_kernel_runs_on_each_devices_own_heads_and_rows(layout, kind, tmp_path, monkeypatch):
    devices, parallel = LAYOUTS[layout]
    model = "model={preset: tiny, vocab_size: 258, num_heads: 4, num_kv_heads: 2, sliding_window: 5}"
    recipe = tiny_recipe(tmp_path, model, f"model.layer_pattern=[{kind}]", parallel)
    batch = random_batches(recipe, 1)[0]

    def step() -> tuple[float, float]:
        program = build_program(recipe, jax.devices()[:devices])
        _, metrics = program.train_step(program.init(), program.shard_batch(batch))
        return metrics["loss"].value(), metrics["grad_norm"].value()

    expected = step()
    seen = []

    def load(request):
        def kernel(q_BSHh, k_BTKh, v_BTKh, mask_BST, **options):
            seen.append((request, q_BSHh.shape, k_BTKh.shape, mask_BST.shape))
            return attend(q_BSHh, k_BTKh, v_BTKh, mask_BST, **options)

        return kernel

    candidate = kernels.Candidate("of this test", lambda request: None, load)
    monkeypatch.setitem(kernels.KERNELS["attention"], "cpu", [candidate])
    kernels._resolve.cache_clear()
    try:
        assert step() == pytest.approx(expected, rel=1e-5)
    finally:
        kernels._resolve.cache_clear()
    tensor, rows = (2, 4) if devices == 8 else (1, 1)
    request, queries, keys, mask = seen[0]
    assert (request.num_heads, request.num_kv_heads) == (4 // tensor, 2 // tensor)
    assert request.segments
    assert request.window == (5 if kind == "sliding" else None)
    assert queries == (8 // rows, 32, 4 // tensor, recipe.model.head_dim)
    assert keys == (8 // rows, 32, 2 // tensor, recipe.model.head_dim)
    assert mask == (8 // rows, 32, 32)
