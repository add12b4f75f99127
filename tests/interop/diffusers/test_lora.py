"""Adapters of diffusion transformers in diffusers' form: its own loader computes the same, and ours reads its files."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from diffusers.loaders.peft import PeftAdapterMixin
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.interop.diffusers.test_transformer import config_of, run, written
from tests.models.dit.references import CLASSES, diffusers, disturbed, flat, torch
from tests.models.dit.test_diffusers import batch_of, of_theirs, relative
from trainfw.adapters import AdapterConfig, attach, config_targets, with_magnitudes
from trainfw.errors import UserError
from trainfw.interop import LORA_WEIGHTS, lora_fields, read_lora, save_lora

ADAPTERS = {
    "class": {"kind": "rslora", "targets": ["attention", "layers.modulation.map", "final.output"]},
    "cross": {"kind": "dora", "targets": "all-linear"},
    "joint": {"targets": ["attention", "mlp"], "patterns": {"layers.mlp.*": {"rank": 2, "alpha": 5}}},
}


def adapted(kind):
    """Our model with an adapter none of whose arrays is as it begins, its config, and what the model was before."""
    model, config = disturbed(config_of(kind), 0), AdapterConfig(rank=3, alpha=6.0, **ADAPTERS[kind])
    before = nnx.clone(model)
    attach(model, config, nnx.Rngs(1))
    with_magnitudes(model)
    rng = np.random.default_rng(2)
    noisy = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), nnx.state(model, nnx.Param))
    nnx.update(model, noisy)
    return model, config, before


@pytest.mark.parametrize("kind", CLASSES)
def test_their_loader_computes_the_same_and_ours_reads_what_they_save(kind, tmp_path):
    model, config, before = adapted(kind)
    arrays = flat(nnx.state(model, nnx.Param))
    written(before, tmp_path / "base")
    save_lora(tmp_path / "lora", config, arrays, model.config)
    own = getattr(diffusers, CLASSES[kind])
    cls = own if kind == "joint" else type("Loads", (own, PeftAdapterMixin), {})  # the others have no loader
    other = cls.from_pretrained(tmp_path / "base").eval()
    other.load_lora_adapter(tmp_path / "lora", weight_name=LORA_WEIGHTS, adapter_name="ours")
    batch = batch_of(model.config, 0)[:3]
    with torch.no_grad():
        expected = of_theirs(other, model.config, *batch).numpy()
    assert relative(run(model, *batch), expected) < 1e-5
    assert relative(run(before, *batch), expected) > 1e-3
    other.save_lora_adapter(tmp_path / "theirs", adapter_name="ours")
    for name in ("lora", "theirs"):
        back, found = read_lora(tmp_path / name, model.config)
        assert (back.kind, back.rank, back.alpha) == (config.kind, 3, 6.0)
        assert set(found) == set(arrays)
        for path, value in arrays.items():
            np.testing.assert_array_equal(found[path], value)
        fields = AdapterConfig(**lora_fields(tmp_path / name, model.config))
        sizes = [config_targets(each, model.config) for each in (config, back, fields)]
        assert sizes[0] == sizes[1] == sizes[2]


def test_a_file_without_a_config_has_the_rank_as_alpha(tmp_path):
    model, config, _ = adapted("joint")
    arrays = flat(nnx.state(model, nnx.Param))
    save_lora(tmp_path / "lora", config, arrays, model.config)
    save_file(load_file(tmp_path / "lora" / LORA_WEIGHTS), tmp_path / "lora" / LORA_WEIGHTS)
    back, _ = read_lora(tmp_path / "lora", model.config)
    assert back.alpha == back.rank
    assert {(size.rank, size.alpha) for size in back.patterns.values()} <= {(2, 2.0), (3, 3.0)}


def test_what_is_not_an_adapter_of_the_transformer_is_refused(tmp_path):
    model, config, _ = adapted("class")
    save_lora(tmp_path / "lora", config, flat(nnx.state(model, nnx.Param)), model.config)
    file = tmp_path / "lora" / LORA_WEIGHTS
    tensors = load_file(file)
    first = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    for name, (changed, metadata) in {
        "is of another model than the transformer": ({"text_encoder.a.lora_A.weight": tensors[first]}, None),
        "no place for tensor transformer.proj.alpha": ({"transformer.proj.alpha": np.ones(1)}, None),
        "no place for tensor transformer.proj.lora_A.weight": (
            {f"transformer.proj.lora_{part}.weight": tensors[first.replace("_A", f"_{part}")] for part in "AB"},
            None,
        ),
        "peft_type = 'LOKR'": ({}, '{"transformer.peft_type": "LOKR"}'),
        "layers_to_transform": (
            {},
            '{"transformer.peft_type": "LORA", "transformer.layers_to_transform": [1], "transformer.r": 3}',
        ),
        "not valid JSON": ({}, "{"),
        "rank 0": ({first.replace("_A", "_B"): np.zeros((3, 0), np.float32)}, None),
    }.items():
        save_file(tensors | changed, file, None if metadata is None else {"lora_adapter_metadata": metadata})
        with pytest.raises(UserError, match=name):
            read_lora(tmp_path / "lora", model.config)
    whole = AdapterConfig(targets=["time.input"])
    with pytest.raises(UserError, match=r"time.input: diffusers has no adapter of it"):
        save_lora(tmp_path / "other", whole, {}, model.config)
