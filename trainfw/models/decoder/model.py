"""One family of decoder-only transformers; `ModelConfig` makes it Llama, Qwen, Mistral or Gemma."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw.models.common.adapter_inputs import AdapterInputs, use_inputs
from trainfw.models.common.attention import Attention, Context, HeadCache, LayerCache
from trainfw.models.common.frozen import Frozen, dense
from trainfw.models.common.layers import MLP, Embedding, Linear, RMSNorm, gather_weights, gathered
from trainfw.models.common.matmul import softcap, wide_einsum
from trainfw.models.common.moe import MoE, MoEStats
from trainfw.models.common.rope import rope_turns
from trainfw.models.decoder.config import LayerKind, ModelConfig
from trainfw.models.layer_stack import INPUT, REDUCED, Layer, Remat, check_remat, init_stack, run_stack, stack_size
from trainfw.parallel import all_gather, axis_index, axis_size, chunk_of, pipelined, reduce_scatter

HeadDims: TypeAlias = Literal["vd", "dv"]
"""Of the output head: the vocabulary and the hidden size. Its gradient in another order would be transposed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens decoded so far, in every layer."""

    keys_LBTKh: jax.Array
    values_LBTKh: jax.Array
    length: jax.Array
    """Tokens held, i32[]; what lies beyond is never seen, and is overwritten."""
    first_B: jax.Array | None = None
    """Of rows padded on the left, the index of each one's first token, i32[B]: it stands at position 0."""


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma normalises what is added too.

    x_BSD is split over `tensor` along its sequence, and so are the norms; attention and mlp take all of it (sequence
    parallelism: Korthikanti et al., arXiv:2205.05198).
    """

    def __init__(self, config: ModelConfig, *, fp8: bool = False, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs) if config.moe is None else MoE(config, rngs=rngs)
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.attention_post_norm = RMSNorm(config.hidden_size, config) if config.post_norms else None
        self.mlp_post_norm = RMSNorm(config.hidden_size, config) if config.post_norms else None
        for _, part in nnx.iter_modules(self) if fp8 else ():
            if isinstance(part, Linear) and not part.kernel.get_metadata().get("wide"):  # as a router's is
                part.fp8 = True

    def __call__(
        self, x_BSD: jax.Array, context: Context, cache: LayerCache | HeadCache | None, kind: LayerKind
    ) -> tuple[jax.Array, tuple[LayerCache | HeadCache | None, MoEStats | None]]:
        """(x_BSD, (the cache extended, what the router did))"""
        y_BSD, cache = self.attention(_gather(self.attention_norm(x_BSD)), context, kind, cache)
        y_BSD = _scatter(y_BSD)
        if self.attention_post_norm is not None:
            y_BSD = self.attention_post_norm(y_BSD)
        x_BSD = x_BSD + y_BSD
        h_BSD, stats = _gather(self.mlp_norm(x_BSD)), None
        if isinstance(self.mlp, MoE):
            # Text must not depend on what else is in the batch: while decoding nothing is dropped.
            y_BSD, stats = self.mlp(h_BSD, context.mask_BS, dropless=cache is not None)
        else:
            y_BSD = self.mlp(h_BSD)
        y_BSD = _scatter(y_BSD)
        if self.mlp_post_norm is not None:
            y_BSD = self.mlp_post_norm(y_BSD)
        return x_BSD + y_BSD, (cache, stats)


def _among_stages(own: jax.Array) -> jax.Array:
    """What a stage has of its layers (chunks, layers, ...), in its place among all layers, and zeros for the others."""
    own = own.reshape(-1, *own.shape[2:])
    everyone = jnp.zeros((axis_size("pipeline") * own.shape[0], *own.shape[1:]), own.dtype)
    return jax.lax.dynamic_update_slice_in_dim(everyone, own, axis_index("pipeline") * own.shape[0], 0)


def _gather(x_BSD: jax.Array) -> jax.Array:
    return all_gather(x_BSD, "tensor", 1)


def _scatter(y_BSD: jax.Array) -> jax.Array:
    return checkpoint_name(reduce_scatter(y_BSD, "tensor", 1), REDUCED)


class Transformer(nnx.Module):
    """Tokens to logits. All its state is `nnx.Param`, in f32, with the logical names of its dims as `axes`.

    Args:
        config: the shape.
        rngs: draws the initial weights.
        compute_dtype: dtype of activations, and of weights where they are used. Norms, rotary embeddings, softmax
            and logits are f32 whatever it is.
        matmul_dtype: "fp8": the layers' linear maps multiply in 8 bits (`fp8_matmul`).
        remat: what the backward pass recomputes: "none" saves all but what was gathered, "full" saves each layer's
            input only, "dots" saves what the layers' projections return as well, "stage" a pipeline stage's input only.
        ring: see `ParallelConfig.context_attention`.
        microbatch_rows, interleave: of a pipeline's microbatches, and chunks of layers in a stage (`pipelined`).
        prefetch: gather the next layer's weights while one computes (with remat "full" or "stage"; scanned, where
            all layers are of one kind).
        scan_layers: compile one layer (one period of `layer_pattern`) and loop over it, rather than all layers in
            a row. The parameters and the numbers are the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: str = "float32",
        matmul_dtype: Literal["fp8"] | None = None,
        remat: Remat = "none",
        scan_layers: bool = True,
        prefetch: bool = False,
        ring: bool = True,
        microbatch_rows: int = 1,
        interleave: int = 1,
    ):
        check_remat(remat)
        self.config, self.compute_dtype = config, compute_dtype
        self.remat, self.scan_layers, self.prefetch, self.ring = remat, scan_layers, prefetch, ring
        self.microbatch_rows, self.interleave = microbatch_rows, interleave
        self.adapter_names: tuple[str, ...] = ()
        """Of adapters that rows choose from (`trainfw.adapters.attach_bank`)."""
        self.embedding = Embedding(config, rngs=rngs)
        fp8 = matmul_dtype == "fp8"
        self.layers = init_stack(lambda rngs: DecoderLayer(config, fp8=fp8, rngs=rngs), config.num_layers, rngs)
        self.final_norm = RMSNorm(config.hidden_size, config)
        size = (config.hidden_size, config.vocab_size)
        self.head = None if config.tie_embeddings else Linear(size, ("embed", "vocab"), std=config.init_std, rngs=rngs)

    def __call__(
        self,
        tokens_BS: jax.Array,
        *,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """logits_BSV, f32. The arguments are those of `hidden_states`."""
        return self.logits(self.hidden_states(tokens_BS, segment_ids_BS=segment_ids_BS, positions_BS=positions_BS))

    def hidden_states(
        self,
        tokens_BS: jax.Array,
        *,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """What `forward` returns, without the stats."""
        return self.forward(tokens_BS, segment_ids_BS=segment_ids_BS, positions_BS=positions_BS)[0]

    def forward(
        self,
        tokens_BS: jax.Array,
        *,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
        mask_BS: jax.Array | None = None,
        adapters: AdapterInputs | None = None,
    ) -> tuple[jax.Array, MoEStats | None]:
        """(x_BSD after the final norm, in the compute dtype, its sequence split over `tensor`; what the routers of all
        layers did, stacked in the order in which the layers are).

        Args:
            tokens_BS: i32.
            segment_ids_BS: a token sees only tokens with its own id: packed documents do not see each other.
            positions_BS: place of each token in its document, for the rotary embeddings; by default 0, 1, 2 ...
            mask_BS: weights of the tokens in the routers' losses, f32; 1 by default.
            adapters: what adapters read, where the model has any that do.
        """
        if positions_BS is None:
            positions_BS = jnp.arange(tokens_BS.shape[1])[None]
        x_BSD = self._embed(tokens_BS)
        graphdef, params = self._layers(adapters)
        key = None if adapters is None else adapters.key

        def run(x_BSD: jax.Array, params: Any, side: Any) -> tuple[jax.Array, Any]:
            positions_BS, segment_ids_BS, mask_BS, of_rows = side
            context = Context(
                self._turns(positions_BS),
                segment_ids_BS=segment_ids_BS,
                mask_BS=mask_BS,
                adapters=None if of_rows is None else AdapterInputs(rows_B=of_rows[0], ids_B=of_rows[1], key=key),
                ring=self.ring,
            )
            return self._run(graphdef, params, x_BSD, context, None)

        of_rows = None if adapters is None else (adapters.rows_B, adapters.ids_B)
        side = (positions_BS, segment_ids_BS, mask_BS if self.config.moe is not None else None, of_rows)
        if axis_size("pipeline") == 1:
            x_BSD, (_, stats) = run(x_BSD, params, side)
            return self.final_norm(x_BSD), stats

        # The microbatches of this device, and its chunks of layers.
        split = functools.partial(jax.tree.map, lambda a: a.reshape(-1, self.microbatch_rows, *a.shape[1:]))
        x_kBSD, (_, stats) = pipelined(
            lambda chunk, x_BSD, side: run(x_BSD, chunk_of(params, chunk, self.interleave), side),
            split(x_BSD),
            split(side),
            chunks=self.interleave,
            remat=self.remat in ("full", "stage"),
            policy=jax.checkpoint_policies.save_only_these_names(INPUT) if self.remat == "full" else None,
        )
        return self.final_norm(x_kBSD.reshape(x_BSD.shape)), jax.tree.map(_among_stages, stats)

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """logits_BSV, f32, from what `hidden_states` returns; the vocabulary is split over `tensor`."""
        w, dims = self.head_weight()
        logits_BSV = wide_einsum(f"bsd,{dims}->bsv", _gather(x_BSD), w)
        return softcap(logits_BSV, self.config.final_softcap)

    def head_weight(self) -> tuple[jax.Array, HeadDims]:
        """The output head in the compute dtype, the vocabulary split over `tensor`, and how its dims lie in memory.

        Tied, it is the embedding's table.
        """
        dtype = jnp.dtype(self.compute_dtype)
        if self.head is None:
            # An adapter of the embedding is not the head's: what PEFT does where they are tied.
            (table,) = nnx.to_flat_state(gather_weights(nnx.State({"table": self.embedding.table}), dtype, self.config))
            return dense(table[1].get_value(), dtype), "vd"
        head = gathered(self.head, dtype, self.config)
        w = dense(head.kernel.get_value(), dtype)
        return (w if head.adapter is None else head.adapter.merged(w)), "dv"

    @property
    def head_learns(self) -> bool:
        """Whether anything in `head_weight` has a gradient."""
        weight = self.embedding.table if self.head is None else self.head.kernel
        return not isinstance(weight, Frozen) or (self.head is not None and self.head.adapter is not None)

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens."""
        config = self.config
        shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
        # Two arrays, not one twice: a cache is donated to the step that extends it.
        keys, values = (jnp.zeros(shape, self.compute_dtype) for _ in range(2))
        return KVCache(keys, values, jnp.zeros((), jnp.int32))

    def decode(
        self, tokens_BS: jax.Array, cache: KVCache, adapters: AdapterInputs | None = None
    ) -> tuple[jax.Array, KVCache]:
        """(logits_BSV, the cache with these tokens): the S tokens that follow those in the cache, which must fit."""
        x_BSD, cache = self.decode_hidden_states(tokens_BS, cache, adapters)
        return self.logits(x_BSD), cache

    def decode_hidden_states(
        self, tokens_BS: jax.Array, cache: KVCache, adapters: AdapterInputs | None = None
    ) -> tuple[jax.Array, KVCache]:
        """`decode` without the head: x_BSD after the final norm."""
        positions_BS = cache.length + jnp.arange(tokens_BS.shape[1])[None]
        if cache.first_B is not None:
            positions_BS = jnp.maximum(positions_BS - cache.first_B[:, None], 0)
        context = Context(self._turns(positions_BS), start=cache.length, first_B=cache.first_B, adapters=adapters)
        x_BSD, ((keys, values), _) = self._run(
            *self._layers(adapters), self._embed(tokens_BS), context, (cache.keys_LBTKh, cache.values_LBTKh)
        )
        return self.final_norm(x_BSD), KVCache(keys, values, cache.length + tokens_BS.shape[1], cache.first_B)

    def _turns(self, positions_BS: jax.Array) -> dict[LayerKind, tuple[jax.Array, jax.Array]]:
        # In order of first use, not a set's: every process must trace the same program.
        return {kind: rope_turns(positions_BS, self.config, kind) for kind in dict.fromkeys(self.config.layer_kinds)}

    def _layers(self, adapters: AdapterInputs | None) -> tuple[Any, Any]:
        """(graphdef, (what learns, (what does not, the layers' places where adapters draw by them)))"""
        graphdef, learning, frozen = nnx.split(self.layers, nnx.Param, ...)  # type: ignore[misc]
        numbers_L = None
        if adapters is not None and adapters.key is not None:
            count = stack_size((learning, frozen))
            numbers_L = axis_index("pipeline") * count + jnp.arange(count, dtype=jnp.int32)
        return graphdef, (learning, (frozen, numbers_L))

    def _embed(self, tokens_BS: jax.Array) -> jax.Array:
        x_BSD = self.embedding(tokens_BS, jnp.dtype(self.compute_dtype))
        if self.config.scale_embeddings:
            x_BSD = x_BSD * jnp.asarray(math.sqrt(self.config.hidden_size), x_BSD.dtype)
        return x_BSD

    def _run(self, graphdef: Any, params: Any, x_BSD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        """These layers, all of them or those of a stage, which begin a period of the pattern."""
        config = self.config
        learning, (frozen, numbers_L) = params
        num_layers = stack_size(params)

        def gather(learning: nnx.State, fixed: Any) -> Any:
            frozen, number = fixed
            return gather_weights(learning, x_BSD.dtype, config), (gather_weights(frozen, x_BSD.dtype, config), number)

        def apply(x_BSD: jax.Array, weights: Any, context: Context, *inputs: Any) -> Any:
            learning, (frozen, number) = weights
            with use_inputs(context.adapters, number):
                return nnx.merge(graphdef, learning, frozen)(x_BSD, context, *inputs)

        return run_stack(
            Layer(gather, apply),
            x_BSD,
            learning,
            (frozen, numbers_L),
            context,
            cache,
            config.layer_kinds[:num_layers],
            len(config.layer_pattern),
            scan=self.scan_layers,
            remat=self.remat,
            prefetch=self.prefetch,
        )


def abstract_model(config: ModelConfig, **options: Any) -> Transformer:
    """The model with shapes in place of arrays, for which no memory is taken. `options` are Transformer's."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))


def count_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of the model, a tied table counted once; `active`: those of one token's experts only."""
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))
    if not active or config.moe is None:
        return total
    idle = config.moe.num_experts - config.moe.experts_per_token
    return total - config.num_layers * idle * 3 * config.hidden_size * config.intermediate_size
