"""Layers of two streams, patches and the caption's tokens, that attend to one another as one sequence (SD3)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw.models.dit.config import DiTConfig
from trainfw.models.dit.layers import Attention, Conditions, FeedForward, Modulation, Turns, attended, gated, modulated
from trainfw.models.layer_stack import REDUCED, gather_sequence, scatter_sequence
from trainfw.parallel import all_reduce

Streams = tuple[jax.Array, jax.Array]
"""x_BSD, the patches, split over `context` and `tensor`; and c_BTD, the caption, which every device has whole."""


def summed(y_BTD: jax.Array) -> jax.Array:
    """Sum what devices along `tensor` have computed of the caption."""
    return checkpoint_name(all_reduce(y_BTD, "tensor"), REDUCED)


class JointLayer(nnx.Module):
    """A layer of MM-DiT (Esser et al., arXiv:2403.03206, figure 2): each stream with its own weights.

    Args:
        last: nothing reads the caption's stream after it, which then has no query to run, no output and no feed-forward
            layer. The weights of its queries are there, as in published models, and have no gradient.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs, *, last: bool = False):
        D, self.last = config.hidden_size, last
        self.eps, self.mlp_eps = config.norm_eps, config.mlp_norm_eps
        self.attention = Attention(config, rngs)
        self.mlp = FeedForward(D, config.intermediate_size, rngs)
        self.modulation = Modulation(D, 6, rngs)
        self.caption_attention = Attention(config, rngs, output=not last)
        self.caption_mlp = None if last else FeedForward(D, config.intermediate_size, rngs)
        self.caption_modulation = Modulation(D, 2 if last else 6, rngs)

    def __call__(self, streams: Streams, conditions: Conditions) -> Streams:
        x_BSD, c_BTD = streams
        active_BD, dtype = conditions.modulation_BM, x_BSD.dtype
        shift, scale, gate, *of_mlp = self.modulation(active_BD, dtype)
        h_BSD = gather_sequence(modulated(x_BSD, shift, scale, self.eps))
        parts = self.caption_modulation(active_BD, dtype)
        # The last layer's are in the other order, as in published weights.
        caption_shift, caption_scale = parts[1::-1] if self.last else parts[:2]
        hc_BTD = modulated(c_BTD, caption_shift, caption_scale, self.eps)
        y_BSD, yc_BTD = self._attended(h_BSD, hc_BTD, conditions.caption_mask_BT, conditions.turns)
        x_BSD = gated(x_BSD, gate, scatter_sequence(y_BSD))
        x_BSD = self._fed(self.mlp, x_BSD, of_mlp, gather_sequence, scatter_sequence)
        if self.caption_mlp is not None and yc_BTD is not None:
            c_BTD = gated(c_BTD, parts[2], summed(yc_BTD))
            c_BTD = self._fed(self.caption_mlp, c_BTD, parts[3:], lambda h_BTD: h_BTD, summed)
        return x_BSD, c_BTD

    def _fed(
        self,
        mlp: FeedForward,
        x_BSD: jax.Array,
        parts: list[jax.Array],
        whole: Callable[[jax.Array], jax.Array],
        put_together: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        shift, scale, gate = parts
        return gated(x_BSD, gate, put_together(mlp(whole(modulated(x_BSD, shift, scale, self.mlp_eps)))))

    def _attended(
        self, h_BSD: jax.Array, hc_BTD: jax.Array, mask_BT: jax.Array | None, turns: Turns | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Let both streams attend to both: (parts of the sums over heads of the patches, and of the caption)."""
        own, caption = self.attention, self.caption_attention
        q_BSHh, k_BNHh, v_BNHh = own.among_patches(h_BSD, turns)
        kc_BTHh, vc_BTHh = caption.keys_and_values(hc_BTD)
        join = functools.partial(jnp.concatenate, axis=1)
        if not self.last:
            q_BSHh = join([q_BSHh, caption.queries(hc_BTD)])
        if mask_BT is not None:
            mask_BT = join([jnp.ones(k_BNHh.shape[:2], mask_BT.dtype), mask_BT])
        o_BSW = attended(q_BSHh, join([k_BNHh, kc_BTHh]), join([v_BNHh, vc_BTHh]), mask_BT)
        S = h_BSD.shape[1]
        if caption.output is None:
            return own.projected(o_BSW), None
        return own.projected(o_BSW[:, :S]), caption.projected(o_BSW[:, S:])
