"""Names of diffusion transformers' tensors in diffusers, and how each is laid out there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Form = Literal["same", "transposed", "patch"]
"""A tensor as ours is; a matrix (out, in) where ours is (in, out); a convolution's kernel (out, channel, row, column),
where ours is (row column channel, out)."""
_BLOCK = "transformer_blocks.{layer}"


@dataclass(frozen=True)
class Row:
    """One of our parameters, and its tensor or, of a layer's, tensors."""

    path: str
    tensor: str
    """Name with `{layer}` where there is one for each layer; of a parameter that is no layer's, they are copies.
    `{last}` is the number of the last layer."""
    form: Form = "same"


def _linear(path: str, tensor: str) -> Iterator[Row]:
    yield Row(f"{path}.kernel", f"{tensor}.weight", "transposed")
    yield Row(f"{path}.bias", f"{tensor}.bias")


def _linears(names: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(row for path, tensor in names.items() for row in _linear(path, tensor))


def _attention(path: str, tensor: str) -> dict[str, str]:
    projections = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}
    return {f"layers.{path}.{own}": f"{_BLOCK}.{tensor}.{name}" for own, name in projections.items()}


_PATCH = (Row("patch.kernel", "pos_embed.proj.weight", "patch"), Row("patch.bias", "pos_embed.proj.bias"))
_MLP = {"layers.mlp.up": f"{_BLOCK}.ff.net.0.proj", "layers.mlp.down": f"{_BLOCK}.ff.net.2"}
_CLASS_EMBEDDER = f"{_BLOCK}.norm1.emb"
DIT = (
    *_PATCH,
    # Every block has a copy of the embedders of time and class.
    *_linears(
        {
            "time.input": f"{_CLASS_EMBEDDER}.timestep_embedder.linear_1",
            "time.output": f"{_CLASS_EMBEDDER}.timestep_embedder.linear_2",
            "layers.modulation.map": f"{_BLOCK}.norm1.linear",
            **_attention("attention", "attn1"),
            **_MLP,
            "final.modulation": "proj_out_1",
            "final.output": "proj_out_2",
        }
    ),
    Row("classes", f"{_CLASS_EMBEDDER}.class_embedder.embedding_table.weight"),
)
PIXART = (
    *_PATCH,
    *_linears(
        {
            "time.input": "adaln_single.emb.timestep_embedder.linear_1",
            "time.output": "adaln_single.emb.timestep_embedder.linear_2",
            "modulation": "adaln_single.linear",
            "caption.input": "caption_projection.linear_1",
            "caption.output": "caption_projection.linear_2",
            **_attention("attention", "attn1"),
            **_attention("caption_attention", "attn2"),
            **_MLP,
            "final.output": "proj_out",
        }
    ),
    Row("layers.table", f"{_BLOCK}.scale_shift_table"),
    Row("final.table", "scale_shift_table"),
)
_LAST = "transformer_blocks.{last}"


def _joint(path: str, block: str) -> dict[str, str]:
    """Name the maps of a layer of two streams, those too that the last layer has none of."""
    own, caption = f"{path}.attention", f"{path}.caption_attention"
    return {
        f"{path}.modulation.map": f"{block}.norm1.linear",
        f"{path}.caption_modulation.map": f"{block}.norm1_context.linear",
        **{f"{own}.{name}": f"{block}.attn.to_{name[0]}" for name in ("query", "key", "value")},
        f"{own}.output": f"{block}.attn.to_out.0",
        **{f"{caption}.{name}": f"{block}.attn.add_{name[0]}_proj" for name in ("query", "key", "value")},
        f"{caption}.output": f"{block}.attn.to_add_out",
        f"{path}.mlp.up": f"{block}.ff.net.0.proj",
        f"{path}.mlp.down": f"{block}.ff.net.2",
        f"{path}.caption_mlp.up": f"{block}.ff_context.net.0.proj",
        f"{path}.caption_mlp.down": f"{block}.ff_context.net.2",
    }


SD3 = (
    *_PATCH,
    *_linears(
        {
            "time.input": "time_text_embed.timestep_embedder.linear_1",
            "time.output": "time_text_embed.timestep_embedder.linear_2",
            "pooled.input": "time_text_embed.text_embedder.linear_1",
            "pooled.output": "time_text_embed.text_embedder.linear_2",
            "caption": "context_embedder",
            **_joint("layers", _BLOCK),
            **_joint("last", _LAST),
            "final.modulation": "norm_out.linear",
            "final.output": "proj_out",
        }
    ),
    *(
        Row(f"{path}.{own}_norm.scale", f"{block}.attn.{name}.weight")
        for path, block in (("layers", _BLOCK), ("last", _LAST))
        for own, name in {
            "attention.query": "norm_q",
            "attention.key": "norm_k",
            "caption_attention.query": "norm_added_q",
            "caption_attention.key": "norm_added_k",
        }.items()
    ),
)
POSITIONS = "pos_embed.pos_embed"
"""Tensor of SD3 that holds the positions of the largest grid: no parameter, but computed."""
NAMES: dict[str, tuple[Row, ...]] = {
    "DiTTransformer2DModel": DIT,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": SD3,
}
"""Tables by the class that reads a directory."""
