"""Caches of serving: each slot's keys and values, in a ring that holds a window where a layer sees no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from trainfw.models.common.matmul import softcap as capped
from trainfw.models.decoder.config import LayerKind, ModelConfig
from trainfw.scopes import ATTENTION

CacheDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]

_LARGEST = 127.0
"""Largest number of int8 on both sides of zero."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotCache:
    """Keys and values of all layers of one kind, or of one layer without the first dim.

    The token at position p of its slot lies at p modulo R. In int8, numbers are those stored times a scale for each
    token and head: the largest of its numbers over 127.
    """

    keys_LBKhR: jax.Array
    values_LBKRh: jax.Array
    key_scales_LBKR: jax.Array | None = None
    value_scales_LBKR: jax.Array | None = None

    @property
    def room(self) -> int:
        """R, tokens of a slot."""
        return self.values_LBKRh.shape[-2]

    def layer(self, place: jax.Array, slot: jax.Array | None) -> SlotCache:
        """Return one layer's part, of all slots or of one."""

        def part(x: jax.Array) -> jax.Array:
            of_layer = jax.lax.dynamic_index_in_dim(x, place, keepdims=False)
            return of_layer if slot is None else jax.lax.dynamic_slice_in_dim(of_layer, slot, 1, 0)

        return jax.tree.map(part, self)

    def written(self, new: SlotCache, at_B: jax.Array, keep_B: jax.Array, slot: jax.Array | None) -> SlotCache:
        """Return the cache with tokens of all layers added: to every slot, or (one row) to one slot.

        Args:
            new: the tokens' keys and values, in this form: R of it is their number.
            at_B: where the first of them goes, i32; none passes the ring's end.
            keep_B: rows that write nothing, bool.
        """
        tokens, values = new.room, self.values_LBKRh

        def write(x: jax.Array, y: jax.Array) -> jax.Array:
            dim = 3 if x is values or x.ndim == 4 else 4  # R
            for b in range(at_B.shape[0]):
                start = [jnp.int32(0)] * x.ndim
                start[1], start[dim] = jnp.int32(b) if slot is None else slot, at_B[b]
                sizes = [*x.shape]
                sizes[1], sizes[dim] = 1, tokens
                old = jax.lax.dynamic_slice(x, start, sizes)
                x = jax.lax.dynamic_update_slice(x, jnp.where(keep_B[b], old, y[:, b : b + 1]), start)
            return x

        return jax.tree.map(write, self, new)


def slot_cache(k_LBSKh: jax.Array, v_LBSKh: jax.Array, dtype: CacheDtype) -> SlotCache:
    """Put keys and values of S tokens in the form of a cache."""
    keys, values = k_LBSKh.transpose(0, 1, 3, 4, 2), v_LBSKh.transpose(0, 1, 3, 2, 4)
    if dtype != "int8":
        return SlotCache(keys.astype(dtype), values.astype(dtype))
    keys, key_scales = _in_8_bits(keys, -2)
    values, value_scales = _in_8_bits(values, -1)
    return SlotCache(keys, values, key_scales, value_scales)


def _in_8_bits(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=dim, keepdims=True) / _LARGEST
    codes = jnp.round(wide / jnp.where(scales > 0, scales, 1.0)).astype(jnp.int8)
    return codes, jnp.squeeze(scales, dim)


def room_of(config: ModelConfig, kind: LayerKind, length: int, chunk: int) -> int:
    """Count the tokens of a slot in layers of a kind: `length`, or a window and a chunk, if that is less.

    A chunk's padding may overwrite tokens no later than a window before it. Both are whole chunks, so that none that
    starts at a multiple passes the end.
    """
    longest = length
    if kind == "sliding":
        assert config.sliding_window is not None
        longest = min(length, config.sliding_window + chunk)
    return -(-longest // chunk) * chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Caches of all layers and how far they are filled, for rows that continue their slots."""

    caches: dict[LayerKind, SlotCache]
    lengths_B: jax.Array
    """Tokens that each row's slot holds, i32."""
    ends_B: dict[LayerKind, jax.Array]
    """`lengths_B` modulo the cache's R, by kind of layer: where the next token goes."""
    slot: jax.Array | None = None
    """The slot of the only row, i32[]; None: row b continues slot b."""

    def attend(
        self,
        q_BSHh: jax.Array,
        k_BSKh: jax.Array,
        v_BSKh: jax.Array,
        place: jax.Array,
        kind: LayerKind,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> jax.Array:
        """Return attention of new tokens to those of their slot and to one another, o_BSHh; softmax in f32."""
        B, S, H, h = q_BSHh.shape
        old, dtype = self.caches[kind].layer(place, self.slot), q_BSHh.dtype
        q_BSKGh = q_BSHh.reshape(B, S, k_BSKh.shape[2], -1, h)
        with jax.named_scope(ATTENTION):
            scores = _product("bskgh,bkhr->bkgsr", q_BSKGh, old.keys_LBKhR.astype(dtype))
            if old.key_scales_LBKR is not None:
                scores = scores * old.key_scales_LBKR[:, :, None, None]
            held_BSR, among_SS = self._seen(old.room, S, kind, window)
            scores = jnp.where(held_BSR[:, None, None], capped(scores * scale, softcap), -1e30)
            own = capped(_product("bskgh,btkh->bkgst", q_BSKGh, k_BSKh) * scale, softcap)
            own = jnp.where(among_SS, own, -1e30)
            top = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (scores, own)))
            weights, own_weights = jnp.exp(scores - top), jnp.exp(own - top)
            total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in (weights, own_weights))
            if old.value_scales_LBKR is not None:
                weights = weights * old.value_scales_LBKR[:, :, None, None]
            o_BKGSh = _product("bkgsr,bkrh->bkgsh", weights.astype(dtype), old.values_LBKRh.astype(dtype))
            o_BKGSh += _product("bkgst,btkh->bkgsh", own_weights.astype(dtype), v_BSKh)
            return (o_BKGSh / total).astype(dtype).transpose(0, 3, 1, 2, 4).reshape(B, S, H, h)

    def _seen(self, room: int, S: int, kind: LayerKind, window: int | None) -> tuple[jax.Array, jax.Array]:
        """Return which new token sees which place of the ring, bool[B, S, R], and which of the new, bool[S, S]."""
        place_R, new_S = jnp.arange(room), jnp.arange(S)
        length_B1, end_B1 = self.lengths_B[:, None], self.ends_B[kind][:, None]
        # A place before the end is of this turn of the ring, one after it of the turn before.
        position_BR = length_B1 - end_B1 + place_R - jnp.where(place_R < end_B1, 0, room)
        seen_BSR = jnp.broadcast_to((position_BR >= 0)[:, None], (length_B1.shape[0], S, room))
        among_SS = new_S[:, None] >= new_S
        if window is not None:
            seen_BSR &= (length_B1 + new_S)[..., None] - position_BR[:, None] < window
            among_SS &= new_S[:, None] - new_S < window
        return seen_BSR, among_SS


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
