import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from trainfw.errors import UserError
from trainfw.interop import config_from_huggingface, params_from_huggingface
from trainfw.models import ModelConfig, abstract_model

SEQUENCE = 48
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLMOE = {"pad_token_id": None, "eos_token_id": None}  # else outside this vocabulary
# Windows shorter than the sequence; layer counts that leave part of a period over.
MODELS = {
    "llama": ("Llama", {"num_hidden_layers": 3}),
    "llama, llama3 scaling": ("Llama", {"num_hidden_layers": 2, "rope_parameters": LLAMA3}),
    "llama, linear scaling, tied": (
        "Llama",
        {
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "mistral": ("Mistral", {"num_hidden_layers": 2, "sliding_window": 7}),
    # Qwen 2 has no head_dim of its own.
    "qwen2": ("Qwen2", {"num_hidden_layers": 2, "head_dim": None}),
    "qwen2, sliding": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "head_dim": None,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, sliding": (
        "Mixtral",
        {"num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 2,
            "moe_intermediate_size": 20,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe, weights as they are": (
        "Qwen3Moe",
        {"num_hidden_layers": 3, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2},
    ),
    # OLMoE has no head_dim of its own.
    "olmoe": ("Olmoe", {"num_hidden_layers": 2, "head_dim": None, "num_experts": 6, "num_experts_per_tok": 2, **OLMOE}),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 5,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("Gemma3Text", {"num_hidden_layers": 8, "sliding_window": 7, "query_pre_attn_scalar": 20}),
    "gemma3, linear scaling": (
        "Gemma3Text",
        {
            "num_hidden_layers": 6,
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def reference(family: str, changes: dict) -> torch.nn.Module:
    """A Transformers model whose every weight is random and matters: no zero biases, no unit norms."""
    fields = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**fields)
    generator = torch.Generator().manual_seed(0)
    # The plain loops: PyTorch's grouped products want widths that are multiples of 16 bytes.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **plain).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name and "Gemma" not in family else 0.0
            weight.copy_(mean + 0.2 * torch.randn(weight.shape, generator=generator))
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """By the names that they have in files: in memory Transformers stores all experts as one tensor."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        files = [load_file(file) for file in sorted(Path(directory).glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(name):
    compare_logits(*MODELS[name])


# One of each family, whose shape Hypothesis draws anew in every run.
FAMILIES = ["llama, llama3 scaling", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral", "qwen3_moe", "olmoe"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_logits_match_transformers_in_any_shape(name, data):
    kv_heads, group, half_dim = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 8)))
    heads, head_dim = kv_heads * group, 2 * half_dim
    if name in ("qwen2", "olmoe"):
        hidden, head_dim = heads * head_dim, None  # the head's size follows from the width
    else:
        hidden = heads * data.draw(st.integers(2, 12))
    family, changes = MODELS[name]
    shape = {
        "vocab_size": data.draw(st.integers(8, 200)),
        "hidden_size": hidden,
        "intermediate_size": data.draw(st.integers(4, 96)),
        "num_hidden_layers": data.draw(st.integers(1, 7)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    if "num_experts_per_tok" in changes:
        experts = data.draw(st.integers(1, 9))
        key = "num_local_experts" if family == "Mixtral" else "num_experts"
        shape |= {key: experts, "num_experts_per_tok": data.draw(st.integers(1, experts))}
    if "sliding_window" in changes:
        shape["sliding_window"] = data.draw(st.integers(2, SEQUENCE + 4))
    compare_logits(family, changes | shape)


def compare_logits(family: str, changes: dict) -> None:
    theirs = reference(family, changes)
    config = config_from_huggingface(theirs.config.to_dict())
    params = params_from_huggingface(config, tensors_of(theirs))
    ours = nnx.merge(nnx.graphdef(abstract_model(config)), nnx.State(params))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, SEQUENCE))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = nnx.jit(lambda model, tokens_BS: model(tokens_BS))(ours, jnp.asarray(tokens))
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_params_have_the_structure_of_a_fresh_model():
    theirs = reference(*MODELS["gemma3"])
    config = config_from_huggingface(theirs.config.to_dict())
    params = params_from_huggingface(config, tensors_of(theirs))
    fresh = nnx.to_pure_dict(nnx.state(abstract_model(config)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, fresh)


def test_experts_have_the_names_of_their_family():
    for family, tensor in {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.6.down_proj"}.items():
        theirs = reference(*MODELS[family])
        config, tensors = config_from_huggingface(theirs.config.to_dict()), tensors_of(theirs)
        down = params_from_huggingface(config, tensors)["layers"]["mlp"]["down"]["kernel"]
        name = f"model.layers.1.{tensor}.weight"
        np.testing.assert_array_equal(down[1, -1], tensors[name].T)
        with pytest.raises(UserError, match=f"no tensor {name}"):
            params_from_huggingface(config, {key: value for key, value in tensors.items() if key != name})


def test_tensors_that_do_not_fit_are_named():
    theirs = reference(*MODELS["qwen2"])
    config, tensors = config_from_huggingface(theirs.config.to_dict()), tensors_of(theirs)
    key = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=f"no tensor {key}"):
        params_from_huggingface(config, {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(UserError, match="no place for tensor extra"):
        params_from_huggingface(config, tensors | {"extra": np.zeros(1)})
    with pytest.raises(UserError, match=rf"{key} has shape \(80, 47\), but the model needs \(80, 48\)"):
        params_from_huggingface(config, tensors | {key: tensors[key][:, 1:]})


# As on the Hub today, keys that do not matter here left out: the form of Transformers 4.
HUB = {
    "llama3.2-1b": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
}


@pytest.mark.parametrize("preset", HUB)
def test_configs_of_the_hub_are_our_presets(preset):
    config = config_from_huggingface(HUB[preset])
    ours = ModelConfig(preset=preset)
    if ours.moe is not None:
        ours = ModelConfig(preset=preset, moe={"dispatch": "dropless"})  # as Transformers computes it
    assert config == ours.model_copy(update={"preset": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "'lama' is not supported; did you mean 'llama'"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    ],
)
def test_what_the_model_lacks_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_huggingface(HUB["llama3.2-1b"] | changes)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
        ("olmoe-1b-7b", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    ],
)
def test_mixtures_that_the_model_lacks_are_refused(preset, changes, message):
    with pytest.raises(UserError, match=message):
        config_from_huggingface(HUB[preset] | changes)
