"""Real weights, SmolLM2-135M-Instruct: in from GGUF and safetensors, out again, and an adapter of them in llama.cpp."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import trainfw
from tests.gguf_files import smollm2_file
from tests.llama import Llama
from trainfw.adapters import AdapterConfig
from trainfw.interop import copy_model, open_model, save_peft
from trainfw.serving import generate, generate_batch
from trainfw.weights import export_model, merge_adapter, read_adapter

TEXT = "The capital of France is Paris. The capital of Italy is"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Imported from GGUF: a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    source = open_model(smollm2_file())
    from trainfw.data import load_tokenizer

    copy_model(source, directory, companions=load_tokenizer(smollm2_file()).save)
    return directory


def reference(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def greedy(reference, prompt, count):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)  # else the padding token's places are hidden
    out = reference.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def test_logits_and_tokens_are_those_of_transformers(model, tmp_path):
    theirs = reference(model)
    loaded, tokenizer = trainfw.load_model(model)
    prompt = tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits.numpy()
    found = np.asarray(loaded(np.array([prompt])))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    tokens = greedy(theirs, prompt, 16)
    assert list(generate(loaded, prompt, max_tokens=16, temperature=0.0)) == tokens
    straight, _ = trainfw.load_model(smollm2_file())
    for ours, same in zip(jax.tree.leaves(nnx.state(straight)), jax.tree.leaves(nnx.state(loaded)), strict=True):
        np.testing.assert_array_equal(ours, same)
    # What Transformers itself writes of it is read as the same, and written again bit for bit.
    theirs.save_pretrained(tmp_path / "theirs")
    assert open_model(tmp_path / "theirs").fingerprint() == open_model(model).fingerprint()
    export_model(str(tmp_path / "theirs"), str(tmp_path / "again"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert set(before) == set(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def write_adapter(directory, model, config, seed=0):
    """Write a random one of attention, at B = 0.05, in PEFT's form."""
    base = open_model(model)
    rng = np.random.default_rng(seed)
    arrays = {}
    for part in ("query", "key", "value", "output"):
        L, D, F = base.parameters[f"layers.attention.{part}.kernel"].shape
        name = f"layers.attention.{part}.adapter"
        arrays[f"{name}.lora_a"] = rng.uniform(-(D**-0.5), D**-0.5, (L, D, 4)).astype(np.float32)
        arrays[f"{name}.lora_b"] = np.float32(0.05) * rng.standard_normal((L, 4, F), np.float32)
    save_peft(directory, config, arrays, base.config, str(model))


def greedy_of(llama, prompt, count):
    """What llama.cpp writes on."""
    chosen = [int(llama.logits(prompt)[-1].argmax())]
    while len(chosen) < count:
        chosen.append(int(llama.logits(chosen[-1:])[-1].argmax()))
    return chosen


@pytest.mark.long
def test_a_merged_adapter_is_the_same_in_llama_cpp(model, tmp_path):
    """In F16, through `merge` and `export --format gguf`: the tokens of the merged model in Transformers."""
    write_adapter(tmp_path / "adapter", model, AdapterConfig(rank=4, alpha=8.0, targets="attention"))
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), base=str(model))
    export_model(str(tmp_path / "merged"), str(tmp_path / "merged.gguf"), format="gguf")
    merged, tokenizer = trainfw.load_model(tmp_path / "merged")
    prompt = tokenizer.encode(TEXT)
    tokens = greedy(reference(tmp_path / "merged"), prompt, 32)
    assert tokens != greedy(reference(model), prompt, 32)
    assert list(generate(merged, prompt, max_tokens=32, temperature=0.0)) == tokens
    with Llama(tmp_path / "merged.gguf") as llama:
        assert greedy_of(llama, prompt, 32) == tokens
    assert read_adapter(str(tmp_path / "adapter"), open_model(model).config).config.rank == 4


@pytest.mark.long
def test_adapters_beside_their_base_are_the_same_in_llama_cpp(model, tmp_path):
    """A LoRA and an rsLoRA in one batch here, each beside one base there: other tokens than the base's, and alike."""
    export_model(str(model), str(tmp_path / "base.gguf"), format="gguf", dtype="float32")
    paths = {kind: str(tmp_path / kind) for kind in ("lora", "rslora")}
    for seed, (kind, path) in enumerate(paths.items()):
        alpha = 8.0 if kind == "lora" else 4.0  # the same scale, and another draw
        write_adapter(path, model, AdapterConfig(kind=kind, rank=4, alpha=alpha, targets="attention"), seed)
        export_model(path, f"{path}.gguf", format="gguf-lora", base=str(model))
    loaded, tokenizer = trainfw.load_model(model, adapters=paths)
    prompt = tokenizer.encode(TEXT)
    rows = generate_batch(loaded, [prompt] * 3, max_tokens=64, temperature=0.0, adapters=[None, *paths])
    tokens = [list(row) for row in rows]
    assert all(len(row) == 64 for row in tokens)
    assert len({tuple(row) for row in tokens}) == 3
    for row, adapter in zip(tokens, (None, *(tmp_path / f"{kind}.gguf" for kind in paths))):
        with Llama(tmp_path / "base.gguf", adapter=adapter) as llama:
            assert greedy_of(llama, prompt, 64) == row
