"""Layers of diffusion transformers: modulated norms, attention of all patches, attention to captions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw import backends
from trainfw.models.common.attention import attend
from trainfw.models.common.layers import Linear, RMSNorm
from trainfw.models.common.rope import apply_rope
from trainfw.models.dit.config import DiTConfig
from trainfw.models.layer_stack import gather_sequence, scatter_sequence
from trainfw.parallel import all_gather
from trainfw.scopes import ATTENTION

Turns = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditions:
    """Inputs that all layers share: rows of the batch, but for the turns."""

    modulation_BM: jax.Array
    """Activation of the time and the rest, f32[B, D], of which each layer makes its modulation; with `cross` the
    modulation itself, f32[B, 6 D]."""
    caption_BTD: jax.Array | None = None
    caption_mask_BT: jax.Array | None = None
    turns: Turns | None = None
    """Rotary cosines and sines of this device's queries, over `tensor` all of them."""


def glorot(size: tuple[int, int]) -> float:
    """Standard deviation of Glorot and Bengio (2010), here of normal numbers, for a matrix (in, out)."""
    return math.sqrt(2.0 / sum(size))


def linear(size: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs, std: float | None = None) -> Linear:
    return Linear(size, axes, std=glorot(size) if std is None else std, bias=True, rngs=rngs)


def modulated(x_BSD: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array, eps: float) -> jax.Array:
    """Normalise x over its last dim, then scale it by 1 + scale and shift it, in f32; back to the dtype of x."""
    wide = x_BSD.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * (1.0 + scale_B1D) + shift_B1D).astype(x_BSD.dtype)


def gated(x_BSD: jax.Array, gate_B1D: jax.Array, y_BSD: jax.Array) -> jax.Array:
    """x + gate * y, in f32; back to the dtype of x."""
    return (x_BSD.astype(jnp.float32) + gate_B1D * y_BSD.astype(jnp.float32)).astype(x_BSD.dtype)


def parts_of(modulation_BM: jax.Array, count: int) -> list[jax.Array]:
    """Cut a modulation into shifts, scales and gates, x_B1D each, f32."""
    return jnp.split(modulation_BM.astype(jnp.float32)[:, None], count, axis=-1)


class Modulation(nnx.Module):
    """Shifts, scales and gates of a layer from the condition, zero at first (adaLN-zero, Peebles and Xie,
    arXiv:2212.09748)."""

    def __init__(self, hidden_size: int, count: int, rngs: nnx.Rngs):
        self.count = count
        self.map = linear((hidden_size, count * hidden_size), ("embed", "mlp"), rngs, std=0.0)

    def __call__(self, active_BD: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
        return parts_of(all_gather(self.map(active_BD.astype(dtype)), "tensor", 1), self.count)


class Attention(nnx.Module):
    """Attention without causality, of patches to all patches or to other keys.

    Heads are split over `tensor`: each device returns a part of the sum over heads.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs, *, output: bool = True, output_std: float | None = None):
        D, width, self.head_dim = config.hidden_size, config.num_heads * config.head_dim, config.head_dim
        self.query, self.key, self.value = (linear((D, width), ("embed", "heads"), rngs) for _ in range(3))
        self.output = linear((width, D), ("heads", "embed"), rngs, output_std) if output else None
        self.query_norm, self.key_norm = (
            RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None for _ in range(2)
        )

    def queries(self, x_BSD: jax.Array) -> jax.Array:
        """q_BSHh, normalised."""
        q_BSHh = self._heads(self.query(x_BSD))
        return q_BSHh if self.query_norm is None else self.query_norm(q_BSHh)

    def keys_and_values(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(k_BTHh, normalised, and v_BTHh)"""
        k_BTHh, v_BTHh = self._heads(self.key(x_BTD)), self._heads(self.value(x_BTD))
        return k_BTHh if self.key_norm is None else self.key_norm(k_BTHh), v_BTHh

    def among_patches(self, x_BSD: jax.Array, turns: Turns | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BSHh of this device's patches, k_BNHh and v_BNHh of all, those of other devices along `context` too)"""
        q_BSHh = self.queries(x_BSD)
        k_BSHh, v_BSHh = self.keys_and_values(x_BSD)
        if turns is not None:
            q_BSHh, k_BSHh = apply_rope(q_BSHh, turns), apply_rope(k_BSHh, turns)
        q_BSHh, k_BSHh = checkpoint_name((q_BSHh, k_BSHh), backends.ROTATED)
        return q_BSHh, all_gather(k_BSHh, "context", 1), all_gather(v_BSHh, "context", 1)

    def projected(self, o_BSW: jax.Array) -> jax.Array:
        assert self.output is not None
        return self.output(o_BSW)

    def _heads(self, x_BSW: jax.Array) -> jax.Array:
        return x_BSW.reshape(*x_BSW.shape[:2], -1, self.head_dim)


def attended(q_BSHh: jax.Array, k_BTHh: jax.Array, v_BTHh: jax.Array, mask_BT: jax.Array | None = None) -> jax.Array:
    """Attention of all queries to all keys, or to those of the mask; its heads joined, o_BSW."""
    B, S, H, h = q_BSHh.shape
    request = backends.AttentionRequest(
        query_length=S,
        key_length=k_BTHh.shape[1],
        num_heads=H,
        num_kv_heads=H,
        head_dim=h,
        dtype=q_BSHh.dtype.name,
        causal=False,
        segments=mask_BT is not None,
        batch=B,
    )
    run = backends.resolve("attention", request, backends.current()).call or attend
    mask_BST = None if mask_BT is None else jnp.broadcast_to(mask_BT[:, None] > 0.5, (B, S, k_BTHh.shape[1]))
    with jax.named_scope(ATTENTION):
        return run(q_BSHh, k_BTHh, v_BTHh, mask_BST, scale=h**-0.5).reshape(B, S, -1)


class FeedForward(nnx.Module):
    """down(gelu(up(x))). Its width is split over `tensor`: each device returns a part of the sum."""

    def __init__(self, hidden_size: int, width: int, rngs: nnx.Rngs):
        self.up = linear((hidden_size, width), ("embed", "mlp"), rngs)
        self.down = linear((width, hidden_size), ("mlp", "embed"), rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        wide = jax.nn.gelu(self.up(x_BSD).astype(jnp.float32), approximate=True)
        return self.down(wide.astype(x_BSD.dtype))


class DiTLayer(nnx.Module):
    """x + gate * attention(norm(x)), attention to the caption where there is one, x + gate * mlp(norm(x)).

    Each layer makes its modulation of the condition; with `cross` all share one, to which each adds a table of its own
    (adaLN-single, Chen et al., arXiv:2310.00426). x_BSD is split over `tensor` along its sequence, as in decoders.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        D = config.hidden_size
        self.eps, self.mlp_eps = config.norm_eps, config.mlp_norm_eps
        self.attention = Attention(config, rngs)
        self.mlp = FeedForward(D, config.intermediate_size, rngs)
        cross = config.conditioning == "cross"
        self.caption_attention = Attention(config, rngs, output_std=0.0) if cross else None
        self.modulation = None if cross else Modulation(D, 6, rngs)
        self.table = table(6, D, rngs) if cross else None

    def __call__(self, x_BSD: jax.Array, conditions: Conditions) -> jax.Array:
        if self.modulation is not None:
            parts = self.modulation(conditions.modulation_BM, x_BSD.dtype)
        else:
            assert self.table is not None
            parts = parts_of(conditions.modulation_BM + self.table[...].reshape(-1), 6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        h_BSD = gather_sequence(modulated(x_BSD, shift, scale, self.eps))
        o_BSW = attended(*self.attention.among_patches(h_BSD, conditions.turns))
        x_BSD = gated(x_BSD, gate, scatter_sequence(self.attention.projected(o_BSW)))
        if self.caption_attention is not None and conditions.caption_BTD is not None:
            q_BSHh = self.caption_attention.queries(gather_sequence(x_BSD))
            k_BTHh, v_BTHh = self.caption_attention.keys_and_values(conditions.caption_BTD)
            o_BSW = attended(q_BSHh, k_BTHh, v_BTHh, conditions.caption_mask_BT)
            x_BSD = x_BSD + scatter_sequence(self.caption_attention.projected(o_BSW))
        h_BSD = gather_sequence(modulated(x_BSD, mlp_shift, mlp_scale, self.mlp_eps))
        return gated(x_BSD, mlp_gate, scatter_sequence(self.mlp(h_BSD)))


def table(rows: int, hidden_size: int, rngs: nnx.Rngs) -> nnx.Param:
    """Make what a layer adds to a shared modulation, f32, drawn as PixArt draws it."""
    drawn = jax.random.normal(rngs.params(), (rows, hidden_size), jnp.float32) / math.sqrt(hidden_size)
    return nnx.Param(drawn, axes=("hidden", "norm"), wide=True)
