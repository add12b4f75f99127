"""Tiny Transformers models of every family, on CPU PyTorch: what we compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

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


def save(directory: Path, name: str, dtype: torch.dtype = torch.float32, **changes: int) -> torch.nn.Module:
    """Write one of MODELS as `save_pretrained` does."""
    family, fields = MODELS[name]
    model = reference(family, fields | changes).to(dtype)
    model.save_pretrained(directory)
    return model


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """By the names that they have in files: in memory Transformers stores all experts as one tensor."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def load(directory: Path) -> torch.nn.Module:
    """By Transformers, which is to find every weight and no other."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True, **plain
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """What Transformers writes on."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
