"""diffusers' models of our random ones, with the same weights, and their gradients by our names."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from trainfw.interop.diffusers.names import NAMES, POSITIONS, Form, Row
from trainfw.models import DiT, DiTConfig, ModelOptions

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
CLASSES = {"class": "DiTTransformer2DModel", "cross": "PixArtTransformer2DModel", "joint": "SD3Transformer2DModel"}


def disturbed(config: DiTConfig, seed: int, **options: Any) -> DiT:
    """A model none of whose parameters is zero, as its biases, modulations and last layer are at first."""
    model = nnx.jit(lambda: DiT(config, ModelOptions(**options), rngs=nnx.Rngs(seed)))()
    rng = np.random.default_rng(seed)
    state = nnx.state(model)
    noisy = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), state)
    nnx.update(model, noisy)
    return model


def reference(config: DiTConfig) -> Any:
    """diffusers' model of the same shape, with random weights."""
    fields = {
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
    }
    if config.conditioning == "class":
        model = diffusers.DiTTransformer2DModel(
            **fields, num_embeds_ada_norm=config.num_classes, norm_eps=config.mlp_norm_eps
        )
        for block in model.transformer_blocks:  # copies, whose gradients are then one
            block.norm1.emb = model.transformer_blocks[0].norm1.emb
    elif config.conditioning == "joint":
        model = diffusers.SD3Transformer2DModel(
            **fields,
            joint_attention_dim=config.caption_size,
            caption_projection_dim=config.hidden_size,
            pooled_projection_dim=config.pooled_size,
            pos_embed_max_size=config.largest_grid,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    else:
        model = diffusers.PixArtTransformer2DModel(
            **fields,
            cross_attention_dim=config.hidden_size,
            caption_channels=config.caption_size,
            norm_eps=config.norm_eps,
            interpolation_scale=config.position_scale,
            use_additional_conditions=False,
        )
    return model.eval()


def rows_of(config: DiTConfig) -> tuple[Row, ...]:
    return NAMES[CLASSES[config.conditioning]]


def theirs(form: Form, x: np.ndarray, config: DiTConfig) -> np.ndarray:
    """One of our arrays, of one layer, as diffusers has it."""
    if form == "transposed":
        return x.T
    if form == "patch":
        p = config.patch_size
        return x.reshape(p, p, -1, x.shape[-1]).transpose(3, 2, 0, 1)
    return x


def flat(tree: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(tree)}


def by_their_names(tree: nnx.State, config: DiTConfig, *, copies: bool = True) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, as diffusers' tensors."""
    found, ours = {}, flat(tree)
    for row in rows_of(config):
        if row.path not in ours:
            continue  # biases that only some have, the feed-forward layer that the last has not
        value = ours.pop(row.path)
        stacked = row.path.startswith("layers.")
        for layer in range(len(value) if stacked else config.num_layers if copies else 1):
            one = value[layer] if stacked else value
            found[row.tensor.format(layer=layer, last=config.num_layers - 1)] = theirs(row.form, one, config)
    assert not ours  # every parameter has a name
    return found


def load(model: Any, tree: nnx.State, config: DiTConfig) -> None:
    tensors = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in by_their_names(tree, config).items()}
    if config.conditioning == "joint":
        tensors[POSITIONS] = model.state_dict()[POSITIONS]
    model.load_state_dict(tensors, strict=True)
