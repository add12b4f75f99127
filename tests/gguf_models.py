"""Tiny Transformers models of the families that GGUF knows, in shapes and scalings that it can say."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from trainfw.formats import TensorInfo

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7}
MODELS = {
    "llama": ("Llama", {}),
    "llama, llama3 scaling": ("Llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama, linear scaling, tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, sliding": ("Mistral", {"sliding_window": 512}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 64,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", GEMMA | {"num_hidden_layers": 3}),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 8}),
    "gemma3, linear scaling": (
        "Gemma3Text",
        GEMMA
        | {
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def reference(family: str, changes: dict, seed: int = 0) -> torch.nn.Module:
    """A Transformers model whose every weight is random and matters, and is one that F16 has: norms are not 0 or 1."""
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    generator = torch.Generator().manual_seed(seed)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **plain).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name and "Gemma" not in family else 0.0
            values = mean + 0.2 * torch.randn(weight.shape, generator=generator)
            # So coarse that 1 + value is exact, as GGUF has the norms of Gemma.
            weight.copy_((values * 4096).round() / 4096)
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """By the names that they have in files: in memory Transformers stores all experts as one tensor."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        files = [load_file(file) for file in sorted(Path(directory).glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


class Arrays:
    """Arrays as `Tensors`."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.arrays[name][index].copy()

    def fingerprint(self) -> str:
        return ""
