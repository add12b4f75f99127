"""Grouped-query attention: causal, within a document, in a sliding window, of a sequence or of what slots continue."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw import backends
from trainfw.models.common.layers import Linear, RMSNorm, together
from trainfw.models.common.matmul import softcap as capped
from trainfw.models.common.matmul import wide_einsum
from trainfw.models.common.rope import apply_rope
from trainfw.models.decoder.config import LayerKind, ModelConfig
from trainfw.parallel import axis_size, causal_mask, gathered_attention, local_indices, ring_attention
from trainfw.scopes import ATTENTION

Cache: TypeAlias = Any
"""One layer's part of what `Slots.attend` takes, or None."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Inputs that attention shares in every layer: where each query stands and which keys it may see."""

    turns: dict[LayerKind, tuple[jax.Array, jax.Array]]
    """Rotary cosines and sines by kind of layer, from `rope_turns`."""
    segment_ids_BS: jax.Array | None = None
    """Tokens see only tokens of their own segment. (Not with `slots`.)"""
    mask_BS: jax.Array | None = None
    """Weights of tokens in the losses of routers."""
    slots: Any = None
    """Caches of serving (`trainfw.models.decoder.slots.Slots`), which the tokens continue."""
    ring: bool = field(default=True, metadata={"static": True})
    """True where keys and values of a split sequence travel round the devices, and are not gathered."""


def attention_mask(context: Context, num_queries: int, num_keys: int, window: int | None) -> jax.Array:
    """Return which query sees which key, bool[B or 1, S, T].

    By index: positions restart with every document, indices do not. A window counts the query itself.
    """
    segments_BS = context.segment_ids_BS
    return causal_mask(jnp.arange(num_queries), jnp.arange(num_keys), segments_BS, segments_BS, window)


def attend(
    q_BSHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    mask_BST: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention, o_BSHh. Query head i reads kv head i // (H / K); scores and softmax are f32.

    Without a mask every query sees every key.
    """
    B, S, H, h = q_BSHh.shape
    q_BSKGh = q_BSHh.reshape(B, S, k_BTKh.shape[2], -1, h)
    scores_BKGST = capped(wide_einsum("bskgh,btkh->bkgst", q_BSKGh, k_BTKh) * scale, softcap)
    # Finite, so that a row which sees nothing is a plain average rather than NaN.
    if mask_BST is not None:
        scores_BKGST = jnp.where(mask_BST[:, None, None], scores_BKGST, -1e30)
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(v_BTKh.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights_BKGST, v_BTKh).reshape(B, S, H, h)


class Attention(nnx.Module):
    """Projections, rotary embeddings and `attend`.

    Heads are split over `tensor`: each device returns a part of the sum over heads.
    """

    TOGETHER: ClassVar = ("query", "key", "value")
    """Linear maps of the same inputs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, width, kv_width = config.hidden_size, *(n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        std, bias = config.hidden_std, config.qkv_bias
        self.query = Linear((D, width), ("embed", "heads"), std=std, bias=bias, rngs=rngs)
        self.key = Linear((D, kv_width), ("embed", "kv_heads"), std=std, bias=bias, rngs=rngs)
        self.value = Linear((D, kv_width), ("embed", "kv_heads"), std=std, bias=bias, rngs=rngs)
        self.output = Linear((width, D), ("heads", "embed"), std=std, rngs=rngs)
        self.query_norm = self._norm("heads", width)
        self.key_norm = self._norm("kv_heads", kv_width)

    def __call__(
        self, x_BSD: jax.Array, context: Context, kind: LayerKind, cache: Cache = None
    ) -> tuple[jax.Array, Cache]:
        """(y_BSD, None), or with `context.slots` (y_BSD, this call's keys and values, BSKh each).

        `cache` is then the layer's own, or its place among those of its kind.
        """
        config = self.config
        B, S, _ = x_BSD.shape
        q_BSW, k_BTW, v_BTW = together(x_BSD, self.query, self.key, self.value)
        q_BSHh, k_BTKh = self._heads(q_BSW, self.query_norm), self._heads(k_BTW, self.key_norm)
        v_BTKh = v_BTW.reshape(B, S, -1, config.head_dim)
        q_BSHh, k_BTKh = apply_rope(q_BSHh, context.turns[kind]), apply_rope(k_BTKh, context.turns[kind])
        q_BSHh, k_BTKh = checkpoint_name((q_BSHh, k_BTKh), backends.ROTATED)
        window = config.sliding_window if kind == "sliding" else None
        scale, softcap = config.attention_scale, config.attention_softcap
        if context.slots is not None:
            o_BSHh = context.slots.attend(
                q_BSHh, k_BTKh, v_BTKh, cache, kind, window=window, scale=scale, softcap=softcap
            )
            return self.output(o_BSHh.reshape(B, S, -1)), (k_BTKh, v_BTKh)
        if axis_size("context") > 1:
            over_context = ring_attention if context.ring else functools.partial(gathered_attention, attend=attend)
            placed = functools.partial(over_context, indices_S=local_indices(S), segment_ids_BS=context.segment_ids_BS)
            o_BSHh = placed(q_BSHh, k_BTKh, v_BTKh, axis="context", window=window, scale=scale, softcap=softcap)
        else:
            mask_BST = attention_mask(context, S, k_BTKh.shape[1], window)
            run = self._kernel(q_BSHh, k_BTKh, context, window)
            with jax.named_scope(ATTENTION):
                o_BSHh = run(q_BSHh, k_BTKh, v_BTKh, mask_BST, scale=scale, softcap=softcap)
        return self.output(o_BSHh.reshape(B, S, -1)), None

    def _kernel(
        self, q_BSHh: jax.Array, k_BTKh: jax.Array, context: Context, window: int | None
    ) -> Callable[..., jax.Array]:
        """`attend`, or what the backend has in its place."""
        request = backends.AttentionRequest(
            query_length=q_BSHh.shape[1],
            key_length=k_BTKh.shape[1],
            num_heads=q_BSHh.shape[2],
            num_kv_heads=k_BTKh.shape[2],
            head_dim=self.config.head_dim,
            dtype=q_BSHh.dtype.name,
            segments=context.segment_ids_BS is not None,
            window=window,
            softcap=self.config.attention_softcap,
            batch=q_BSHh.shape[0],
        )
        return backends.resolve("attention", request, backends.current()).call or attend

    def _norm(self, axis: str, width: int) -> RMSNorm | None:
        config = self.config
        if not config.qk_norm:
            return None
        size, split = (width, axis) if config.qk_norm == "all_heads" else (config.head_dim, "norm")
        return RMSNorm(size, eps=config.norm_eps, zero_centered=config.zero_centered_norm, axis=split)

    def _heads(self, x_BSW: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """x_BSHh, each head or all of them together normalised."""
        together = self.config.qk_norm == "all_heads"
        if norm is not None and together:
            x_BSW = norm(x_BSW)
        x_BSHh = x_BSW.reshape(*x_BSW.shape[:2], -1, self.config.head_dim)
        return x_BSHh if norm is None or together else norm(x_BSHh)
