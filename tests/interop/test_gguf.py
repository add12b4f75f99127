"""Models through GGUF: what is written is read back, and is what Transformers reads."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gguf_files import byte_level, write_gguf
from tests.gguf_models import MODELS, Arrays, reference, tensors_of
from trainfw.errors import UserError
from trainfw.interop import GGUFTensors, config_from_huggingface, gguf_config, save_gguf
from trainfw.interop.gguf.tensor_names import to_halves, to_pairs

# Its reader knows no others, and of qwen3moe not the width of an expert.
TRANSFORMERS_READS = [
    name for name in MODELS if name.startswith(("llama", "qwen2", "qwen3", "gemma")) and "moe" not in name
]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"), size=300)


def saved(model, file, tokenizer_dir, **changes):
    huggingface = json.loads(model.config.to_json_string())
    save_gguf(file, huggingface, Arrays(tensors_of(model)), tokenizer_dir, **changes)
    return huggingface


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name, tmp_path, tokenizer_dir):
    model = reference(*MODELS[name])
    file = tmp_path / "model.gguf"
    huggingface = saved(model, file, tokenizer_dir, quantization="F32")
    read, expected = GGUFTensors(file), tensors_of(model)
    assert set(read.infos) == set(expected) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    for tensor, info in read.infos.items():
        values = read.read(tensor)
        assert (values.shape, values.dtype) == (info.shape, info.dtype)
        np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)
    ours, theirs = config_from_huggingface(gguf_config(file)), config_from_huggingface(huggingface)
    changes = {} if model.config.model_type not in ("mistral", "mixtral") else {"max_position": theirs.max_position}
    assert ours.model_copy(update=changes) == theirs
    # And Transformers takes the config as one of its own.
    config = transformers.AutoConfig.for_model(**gguf_config(file))
    assert config_from_huggingface(json.loads(config.to_json_string())) == ours


@pytest.mark.parametrize("name", TRANSFORMERS_READS)
def test_transformers_reads_the_same_model(name, tmp_path, tokenizer_dir):
    family, changes = MODELS[name]
    model = reference(family, changes)
    saved(model, tmp_path / "model.gguf", tokenizer_dir, quantization="F32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        # Its own reading of the config leaves out the width of heads and of experts.
        str(tmp_path),
        gguf_file="model.gguf",
        config=model.config,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    state, ours = theirs.state_dict(), GGUFTensors(tmp_path / "model.gguf")
    for name in [name for name in state if name.endswith("experts.gate_up_proj")]:
        experts, down = name.rpartition(".")[0], state.pop(name.replace("gate_up", "down"))
        for i, both in enumerate(state.pop(name)):
            gate, up = both.chunk(2)
            parts = {"gate": gate, "up": up, "down": down[i]}
            state |= {f"{experts}.{i}.{part}_proj.weight": value for part, value in parts.items()}
    assert set(ours.infos) == set(state) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    for tensor in ours.infos:
        np.testing.assert_array_equal(ours.read(tensor), state[tensor].numpy(), err_msg=tensor)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0"])
def test_what_is_written_smaller_is_rounded_and_nothing_else(quantization, tmp_path, tokenizer_dir):
    model = reference(*MODELS["llama"])
    file = tmp_path / "model.gguf"
    saved(model, file, tokenizer_dir, quantization=quantization)
    read, expected = GGUFTensors(file), tensors_of(model)
    tolerance = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7}[quantization]
    for tensor, values in expected.items():
        back = read.read(tensor).astype(np.float32)
        np.testing.assert_allclose(back, values, rtol=0, atol=tolerance * np.abs(values).max(), err_msg=tensor)
        if values.ndim == 1:
            assert read.infos[tensor].dtype == np.float32
            np.testing.assert_array_equal(back, values)
        elif quantization == "F16":
            np.testing.assert_array_equal(read.read(tensor), values.astype(np.float16))
    dtype = {"F16": "float16", "BF16": "bfloat16", "Q8_0": "float32"}[quantization]
    assert gguf_config(file)["torch_dtype"] == dtype
    # Twice the same, but for the weights.
    again = tmp_path / "again.gguf"
    saved(model, again, tokenizer_dir, quantization=quantization)
    assert GGUFTensors(again).fingerprint() == read.fingerprint()
    saved(reference(*MODELS["llama"], seed=1), again, tokenizer_dir, quantization=quantization)
    assert GGUFTensors(again).fingerprint() != read.fingerprint()


HEADS = {"attn_q": 4, "attn_k": 2, "attn_v": None}
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0", "Q5_K", "Q2_K", "Q3_K"]


def _stored(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random values as they are stored: random bits, with scales that are finite."""
    random = np.random.default_rng([rows, columns])
    values = random.standard_normal((rows, columns)).astype(np.float32)
    if kind in ("F32", "F16"):
        return values.astype({"F32": np.float32, "F16": np.float16}[kind])
    if kind in ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"):
        return quants.quantize(values, GGMLQuantizationType[kind])
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (rows, columns // block, size), np.uint8)
    scales = {"Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210), "Q2_K": (80, 84), "Q3_K": (108, 110)}[kind]
    halves = random.uniform(-1, 1, (rows, columns // block, (scales[1] - scales[0]) // 2)).astype(np.float16)
    data[..., scales[0] : scales[1]] = halves.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A file and its whole tensors for each type; q, k and v of 4 heads and 2."""
    made = {}
    for kind in TYPES:
        metadata = {
            "general.architecture": "llama",
            "llama.block_count": 1,
            "llama.context_length": 64,
            "llama.embedding_length": 512,
            "llama.feed_forward_length": 64,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.attention.key_length": 16,
        }
        stored = {
            f"blk.0.{name}.weight": (kind, _stored(kind, 16 * (heads or 2), 512)) for name, heads in HEADS.items()
        }
        stored["token_embd.weight"] = (kind, _stored(kind, 50, 512))
        file = write_gguf(tmp_path_factory.mktemp("quantised") / f"{kind}.gguf", metadata, stored)
        whole = {}
        for (name, heads), theirs in zip(HEADS.items(), "qkv"):
            values = quants.dequantize(stored[f"blk.0.{name}.weight"][1], GGMLQuantizationType[kind])
            whole[f"model.layers.0.self_attn.{theirs}_proj.weight"] = to_halves(values, heads) if heads else values
        whole["model.embed_tokens.weight"] = quants.dequantize(
            stored["token_embd.weight"][1], GGMLQuantizationType[kind]
        )
        made[kind] = GGUFTensors(file), whole
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(TYPES))
def test_a_part_is_that_part_of_the_whole(quantised, kind, data, monkeypatch):
    tensors, whole = quantised[kind]
    monkeypatch.setattr("trainfw.interop.gguf.reader.CHUNK_BYTES", data.draw(st.sampled_from([1, 50_000, 1 << 23])))
    name = data.draw(st.sampled_from(sorted(whole)))
    ranges = [sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2))) for length in whole[name].shape]
    index = tuple(slice(*ends) for ends in ranges)[: data.draw(st.integers(0, 2))]
    part = tensors.read(name, index)
    assert part.dtype == tensors.infos[name].dtype
    np.testing.assert_array_equal(part.astype(np.float32), whole[name][index])
    assert part.base is None or part.base.size == part.size


@given(heads=st.integers(1, 5), half=st.integers(1, 6))
def test_heads_are_turned_and_turned_back(heads, half):
    rows = np.arange(heads * half * 2 * 3).reshape(-1, 3)
    np.testing.assert_array_equal(to_halves(to_pairs(rows, heads), heads), rows)
    # Row i of the second half of a head comes after row i of the first.
    first = to_pairs(rows, heads)[:2, 0] // 3
    np.testing.assert_array_equal(first, [0, half])


REFUSED = {
    "a window in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "experts' weights as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "another scale of queries": ("gemma2", {"query_pre_attn_scalar": 20}),
    "another pattern of layers": ("gemma3", {"layer_types": ["full_attention"] * 8}),
    "no softcap": ("gemma2", {"attn_logit_softcapping": None}),
    "another scaling of frequencies": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "rope_parameters": None,
        },
    ),
    "key heads that are shared": ("olmoe", {"num_key_value_heads": 2}),
    "an unknown family": ("llama", {"model_type": "lama"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_run_otherwise_is_not_written(name, tmp_path, tokenizer_dir):
    of, changes = REFUSED[name]
    model = reference(*MODELS[of])
    huggingface = json.loads(model.config.to_json_string()) | {"layer_types": None} | changes
    with pytest.raises(UserError):
        save_gguf(tmp_path / "model.gguf", huggingface, Arrays(tensors_of(model)), tokenizer_dir)
    assert os.listdir(tmp_path) == []


def _without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGED = {
    "no tensor": (lambda arrays: _without(arrays, Q), f"no tensor {Q}"),
    "has no place": (lambda arrays: arrays | {"model.extra.weight": arrays[Q]}, "no place for tensor model.extra"),
    "another shape": (lambda arrays: arrays | {Q: arrays[Q][:-2]}, "has shape"),
    "not finite": (lambda arrays: arrays | {"model.norm.weight": arrays["model.norm.weight"] * np.nan}, "not finite"),
    "beyond F16": (lambda arrays: arrays | {Q: arrays[Q] * 1e6}, "beyond F16: use BF16 or F32"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_tensors_that_cannot_be_written_leave_nothing(name, tmp_path, tokenizer_dir):
    change, message = DAMAGED[name]
    model = reference(*MODELS["llama"])
    (tmp_path / "model.gguf").write_text("what was there")
    with pytest.raises(UserError, match=message):
        save_gguf(
            tmp_path / "model.gguf",
            json.loads(model.config.to_json_string()),
            Arrays(change(tensors_of(model))),
            tokenizer_dir,
        )
    assert os.listdir(tmp_path) == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "what was there"


def test_the_gguf_library_is_asked_for(tmp_path, monkeypatch, tokenizer_dir):
    file = tmp_path / "model.gguf"
    model = reference(*MODELS["llama"])
    saved(model, file, tokenizer_dir)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match='pip install "gguf>='):
        gguf_config(file)
    with pytest.raises(UserError, match='pip install "gguf>='):
        saved(model, Path(tmp_path / "other.gguf"), tokenizer_dir)
