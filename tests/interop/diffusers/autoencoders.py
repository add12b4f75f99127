"""Diffusers' autoencoders of small random shapes, and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

SHAPES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "sd3": {
        "block_out_channels": (8, 12),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "greys": {"in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 8},
    "plain": {
        "block_out_channels": (6, 4, 8),
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
        "use_post_quant_conv": False,
    },
}


def make(name: str, seed: int = 0, **changes: Any) -> AutoencoderKL:
    """One with random weights, biases and norms."""
    torch.manual_seed(seed)
    shape = SHAPES[name] | changes
    blocks = len(shape["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    model = AutoencoderKL(**{"sample_size": 16} | shape, **types)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def first(image: np.ndarray) -> torch.Tensor:
    """Channels first."""
    return torch.tensor(np.moveaxis(image, -1, 1))


def last(image: torch.Tensor) -> np.ndarray:
    return np.moveaxis(image.detach().numpy(), 1, -1)
