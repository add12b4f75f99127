"""Caches of serving: each slot's keys and values, in a ring that holds a window where a layer sees no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from trainfw.models.common.adapter_inputs import AdapterInputs
from trainfw.models.common.matmul import softcap as capped
from trainfw.models.common.matmul import wide_einsum
from trainfw.models.decoder.config import LayerKind, ModelConfig
from trainfw.quantization import quantize
from trainfw.scopes import ATTENTION

CacheDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotCache:
    """Keys and values of one layer, or with a leading dim of layers of one kind.

    The token at position p of its slot lies at p modulo R. In int8, numbers are those stored times a scale for each
    token and head: the largest of its numbers over 127.
    """

    keys_BKhR: jax.Array
    values_BKRh: jax.Array
    key_scales_BKR: jax.Array | None = None
    value_scales_BKR: jax.Array | None = None

    @property
    def room(self) -> int:
        """R, tokens of a slot."""
        return self.keys_BKhR.shape[-1]

    def layer(self, place: jax.Array) -> SlotCache:
        """Return one layer's part."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), self)

    def of_slot(self, slot: jax.Array) -> SlotCache:
        """Return one slot's part of one layer."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), self)

    def written(self, new: SlotCache, at_B: jax.Array, keep_B: jax.Array, slot: jax.Array | None) -> SlotCache:
        """Return the cache with tokens added: to every slot, or (one row) to one slot.

        Args:
            new: the tokens' keys and values, in this form: R of it is their number.
            at_B: where the first of them goes, i32; none passes the ring's end.
            keep_B: rows that write nothing, bool.
        """

        def write(x: jax.Array, y: jax.Array, rows: int, ring: int) -> jax.Array:
            """Write along dim `ring`; slots lie along `rows`. Both count from the last dim."""
            for b in range(at_B.shape[0]):
                start, sizes = [jnp.int32(0)] * x.ndim, [*x.shape]
                start[rows], start[ring] = jnp.int32(b) if slot is None else slot, at_B[b]
                sizes[rows], sizes[ring] = 1, y.shape[ring]
                row = jax.lax.slice_in_dim(y, b, b + 1, axis=y.ndim + rows)
                old = jax.lax.dynamic_slice(x, start, sizes)
                x = jax.lax.dynamic_update_slice(x, jnp.where(keep_B[b], old, row), start)
            return x

        keys = write(self.keys_BKhR, new.keys_BKhR, -4, -1)
        values = write(self.values_BKRh, new.values_BKRh, -4, -2)
        scales = [
            write(old, added, -3, -1)
            for old, added in (
                (self.key_scales_BKR, new.key_scales_BKR),
                (self.value_scales_BKR, new.value_scales_BKR),
            )
            if old is not None and added is not None
        ]
        return SlotCache(keys, values, *scales)


def slot_cache(k_BSKh: jax.Array, v_BSKh: jax.Array, dtype: CacheDtype) -> SlotCache:
    """Put keys and values of S tokens in the form of a cache; leading dims stay."""
    keys, values = jnp.moveaxis(k_BSKh, -3, -1), v_BSKh.swapaxes(-3, -2)
    if dtype != "int8":
        return SlotCache(keys.astype(dtype), values.astype(dtype))
    keys, key_scales = _in_8_bits(keys, -2)
    values, value_scales = _in_8_bits(values, -1)
    return SlotCache(keys, values, key_scales, value_scales)


def _in_8_bits(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    kept = quantize(x, "int8", dim=dim)
    return kept.codes, jnp.squeeze(kept.scales, dim)


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


def abstract_caches(
    config: ModelConfig, dtype: CacheDtype, *, slots: int, length: int, chunk: int, tensor: int
) -> dict[LayerKind, SlotCache]:
    """Describe the caches of all layers by kind, ShapeDtypeStructs, over so many devices along `tensor`.

    Their first dims are layers, slots and heads: where devices share a head, each has it.
    """
    heads, caches = max(config.num_kv_heads, tensor), {}
    for kind in dict.fromkeys(config.layer_kinds):
        room, lead = room_of(config, kind, length, chunk), (config.layer_kinds.count(kind), slots, heads)
        keys, values = (*lead, config.head_dim, room), (*lead, room, config.head_dim)
        shapes = [(keys, dtype), (values, dtype), *([((*lead, room), "float32")] * 2 if dtype == "int8" else [])]
        caches[kind] = SlotCache(*(jax.ShapeDtypeStruct(*one) for one in shapes))  # type: ignore[arg-type]
    return caches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Caches of all layers and how far they are filled, for rows that continue their slots."""

    caches: dict[LayerKind, SlotCache]
    """Caches of all layers of each kind, or with arrays of their own for each layer (`Unstacked`)."""
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
        old: SlotCache | jax.Array,
        kind: LayerKind,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> jax.Array:
        """Return attention of new tokens to those of their slot and to one another, o_BSHh; softmax in f32.

        Args:
            old: this layer's cache, or its place among those of its kind.
        """
        B, S, H, h = q_BSHh.shape
        if not isinstance(old, SlotCache):
            old = self.caches[kind].layer(old)
        if self.slot is not None:
            old = old.of_slot(self.slot)
        K = k_BSKh.shape[2]
        # In the wider of both dtypes; int8 in that of the queries.
        dtype = jnp.promote_types(q_BSHh.dtype, old.keys_BKhR.dtype)
        k_BSKh, v_BSKh = k_BSKh.astype(dtype), v_BSKh.astype(dtype)
        # The queries of a head of keys as rows of one matrix: what XLA's CPU backend has fast kernels for.
        q_BKNh = q_BSHh.astype(dtype).reshape(B, S, K, -1, h).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, h)
        with jax.named_scope(ATTENTION):
            scores = wide_einsum("bknh,bkhr->bknr", q_BKNh, old.keys_BKhR.astype(dtype))
            if old.key_scales_BKR is not None:
                scores = scores * old.key_scales_BKR[:, :, None]
            held_BSR, among_SS = self._seen(old.room, S, kind, window)
            G = H // K
            held_BNR, among_NS = jnp.tile(held_BSR, (1, G, 1)), jnp.tile(among_SS, (G, 1))
            scores = jnp.where(held_BNR[:, None], capped(scores * scale, softcap), -1e30)
            own = capped(wide_einsum("bknh,btkh->bknt", q_BKNh, k_BSKh) * scale, softcap)
            own = jnp.where(among_NS, own, -1e30)
            top = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (scores, own)))
            weights, own_weights = jnp.exp(scores - top), jnp.exp(own - top)
            total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in (weights, own_weights))
            if old.value_scales_BKR is not None:
                weights = weights * old.value_scales_BKR[:, :, None]
            o_BKNh = wide_einsum("bknr,bkrh->bknh", weights.astype(dtype), old.values_BKRh.astype(dtype))
            o_BKNh += wide_einsum("bknt,btkh->bknh", own_weights.astype(dtype), v_BSKh)
            o_BKGSh = (o_BKNh / total).astype(q_BSHh.dtype).reshape(B, K, G, S, h)
            return o_BKGSh.transpose(0, 3, 1, 2, 4).reshape(B, S, H, h)

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


class SlotModel(Protocol):
    """A model that serves: it writes text, and keeps what it has read in slots."""

    def abstract_caches(
        self, dtype: CacheDtype, *, slots: int, length: int, chunk: int, tensor: int
    ) -> dict[LayerKind, SlotCache]:
        """Describe the caches (`abstract_caches`)."""

    def extend_slots(
        self, tokens_BS: jax.Array, slots: Slots, keep_B: jax.Array, dtype: CacheDtype, adapters: AdapterInputs | None
    ) -> tuple[jax.Array, dict[LayerKind, SlotCache]]:
        """Return (x_BSD after the final norm, the caches with these tokens): S tokens that follow those of their slots.

        Args:
            keep_B: rows that leave their slot as it is, bool.
            dtype: of the caches.
        """

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """logits_BSV, f32, the vocabulary split over `tensor`."""
