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
    """Name with `{layer}` where there is one for each layer; of a parameter that is no layer's, they are copies."""
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
NAMES: dict[str, tuple[Row, ...]] = {"DiTTransformer2DModel": DIT, "PixArtTransformer2DModel": PIXART}
"""By the class that reads a directory."""
