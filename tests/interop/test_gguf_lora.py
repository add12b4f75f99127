"""Adapters in llama.cpp beside their base: the numbers of PEFT, and of weights with the update added."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.gguf_files import byte_level
from tests.gguf_models import MODELS, Arrays, reference, tensors_of
from tests.helpers import quicker
from tests.llama import Llama
from trainfw import UserError
from trainfw.adapters import AdapterConfig, PatternConfig, adaptable, config_targets, weight_of
from trainfw.interop import config_from_huggingface, open_model, save_gguf, save_gguf_lora
from trainfw.interop.mapping import parameters
from trainfw.models import abstract_model
from trainfw.weights import export_model

TOKENS = [5, 300, 17, 42, 99, 4, 250, 251, 8, 8, 130, 77]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}},
    "rslora, patterns": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3, "layers.1.self_attn.k_proj": 7},
        "alpha_pattern": {"q_proj": 5, "layers.0.self_attn.k_proj": 64},
    },
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora": {"target_modules": LINEAR, "use_dora": True},
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"), size=320)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama, untied, with grouped heads: a directory, and the same as base.gguf in it."""
    directory = byte_level(tmp_path_factory.mktemp("base"), size=320)
    reference(*MODELS["llama"]).save_pretrained(directory)
    export_model(str(directory), str(directory / "base.gguf"), format="gguf", dtype="float32")
    return directory


def written(base, directory, **fields):
    """A PEFT adapter with every weight off its start, and the logits of the model that has it."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    model.save_pretrained(directory)
    return logits


def logits_of(base, adapter=None):
    with Llama(base, adapter=adapter) as llama:
        return llama.logits(TOKENS)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "dora"])
def test_logits_are_those_of_peft(base, tmp_path, adapter):
    expected = written(base, tmp_path / "peft", **ADAPTERS[adapter])
    file = tmp_path / "adapter.gguf"
    said = export_model(str(tmp_path / "peft"), str(file), format="gguf-lora", base=str(base))
    assert said.startswith(f"{file}: {adapter.split(',')[0] if 'lora' in adapter else 'lora'}, ")
    assert np.abs(logits_of(base / "base.gguf") - expected).max() > 0.1 * np.abs(expected).max()
    difference = np.abs(logits_of(base / "base.gguf", file) - expected).max()
    assert difference < 1e-5 * np.abs(expected).max(), difference
    with pytest.raises(UserError, match=r"general.type = 'adapter': expected a model's file"):
        open_model(file)


@pytest.mark.parametrize("name", quicker(MODELS, ["mixtral"]))
def test_every_linear_map_of_every_family(name, tmp_path, tokenizer_dir):
    """Experts too, which PEFT has no form for: the same as with s A B added to the base's own weights."""
    model = reference(*MODELS[name])
    huggingface, tensors = json.loads(model.config.to_json_string()), tensors_of(model)
    config = config_from_huggingface(huggingface)
    other = {"layers.attention.key": PatternConfig(rank=3, alpha=5.0)}
    adapter = AdapterConfig(kind="rslora", rank=4, alpha=3.0, targets="all-linear", patterns=other)
    base, beside, merged = (tmp_path / f"{of}.gguf" for of in ("base", "adapter", "merged"))
    save_gguf(base, huggingface, Arrays(tensors), tokenizer_dir, quantization="F32")
    modules, rng, arrays = adaptable(abstract_model(config)), np.random.default_rng(0), {}
    for path, (rank, alpha) in config_targets(adapter, config).items():
        *stacked, inputs, outputs = weight_of(modules[path]).get_value().shape
        a = rng.normal(0, 0.2, (*stacked, inputs, rank)).astype(np.float32)
        b = rng.normal(0, 0.2, (*stacked, rank, outputs)).astype(np.float32)
        arrays |= {f"{path}.adapter.lora_a": a, f"{path}.adapter.lora_b": b}
        for place, tensor in parameters(config, huggingface["model_type"])[f"{path}.kernel"].names():
            tensors[tensor] = tensors[tensor] + (alpha / rank**0.5 * a[place] @ b[place]).T
    save_gguf_lora(beside, adapter, arrays, config)
    save_gguf(merged, huggingface, Arrays(tensors), tokenizer_dir, quantization="F32")
    expected = logits_of(merged)
    assert np.abs(logits_of(base) - expected).max() > 0.1 * np.abs(expected).max()
    # llama.cpp looks Gemma's activation up in a table of 16 bits.
    difference = np.abs(logits_of(base, beside) - expected).max()
    assert difference < (5e-4 if "gemma" in name else 1e-5) * np.abs(expected).max(), difference


def test_what_llama_cpp_would_not_run_is_refused(base, tmp_path):
    out, source = tmp_path / "out.gguf", str(tmp_path / "peft")
    written(base, source, **ADAPTERS["dora"])

    def refused(match, path=source, **fields):
        with pytest.raises(UserError, match=match):
            export_model(path, str(out), **{"format": "gguf-lora", "base": str(base)} | fields)
        assert [file.name for file in tmp_path.iterdir()] == ["peft"], "something was written"

    refused("'dora': llama.cpp's adapters have no magnitudes; .*`trainfw merge`.* as gguf")
    refused(r"its form does not hold its base; name one with base \(--base\)", base=None)
    refused(r"base .* \(--base\): goes with format gguf-lora", format="peft")
    refused("an adapter is written as it is, in float32", dtype="float16")
    refused("is no adapter for llama.cpp: expected a run of one, or a directory in PEFT's form", str(base))
    with pytest.raises(UserError, match=r"base.gguf: exists; nothing is overwritten"):
        export_model(source, str(base / "base.gguf"), format="gguf-lora", base=str(base))

    model = config_from_huggingface(json.loads((base / "config.json").read_text()))
    config = AdapterConfig(rank=1, targets=["embedding"])
    shapes = {"lora_a": (320, 1), "lora_b": (1, 64)}
    arrays = {f"embedding.adapter.{part}": np.ones(shape, np.float32) for part, shape in shapes.items()}
    tied = model.model_copy(update={"tie_embeddings": True})
    with pytest.raises(UserError, match=r"embedding: llama\.cpp takes the adapter of a tied table for the head's too"):
        save_gguf_lora(out, config, arrays, tied)
    arrays["embedding.adapter.lora_b"][0, -1] = np.nan
    with pytest.raises(UserError, match=r"tensor token_embd.weight.lora_b has values that are not finite"):
        save_gguf_lora(out, config, arrays, model)
    assert [file.name for file in tmp_path.iterdir()] == ["peft"], "half a file is left"
