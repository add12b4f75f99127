"""A causal model of tokens: an embedding, a stack of layers, a norm and a head, in every layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from trainfw.errors import UserError, short
from trainfw.models.common.adapter_inputs import AdapterInputs
from trainfw.models.common.layers import Embedding, FewRows, Linear, RMSNorm, gathered, gathered_array, of_few_rows
from trainfw.models.common.matmul import Frozen, dense, softcap, wide_einsum
from trainfw.models.common.moe import MoEStats
from trainfw.models.family import FamilyConfig, ModelOptions, family_of
from trainfw.models.layer_stack import StackedModel, gather_sequence
from trainfw.paths import path_text
from trainfw.pieces import is_own, running

HeadDims: TypeAlias = Literal["vd", "dv"]
"""Order of the output head's dims: vocabulary and hidden size. A gradient in another order would be transposed."""


class TokenModel(Protocol):
    """A model as objectives ask it: hidden states of tokens, and the head that makes logits of them."""

    @property
    def final_softcap(self) -> float | None:
        """Squashes logits into (-cap, cap) with tanh."""

    @property
    def head_learns(self) -> bool:
        """Tell whether anything in `head_weight` has a gradient."""

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
            positions_BS: place of each token in its document; by default 0, 1, 2 ...
            mask_BS: weights of the tokens in the routers' losses, f32; 1 by default.
            adapters: what adapters read, where the model has any that do.
        """

    def head_weight(self) -> tuple[jax.Array, HeadDims]:
        """The output head in the compute dtype, the vocabulary split over `tensor`, and how its dims lie in memory."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenPlaces:
    """Positions of the tokens, for layers that read no more than that."""

    positions_BS: jax.Array
    segment_ids_BS: jax.Array | None


class Origin(Protocol):
    """Place that a model was loaded from, whose tokenizer and further files are written beside it. Hashable."""

    def save(self, model: LanguageModel, directory: str, dtype: str | None) -> str: ...


class LanguageModel(StackedModel):
    """A `TokenModel` of three parts, which a family makes: `embedding`; `layers`, of `init_stack`; and the head, that
    is `final_norm` and `head` (None: the embedding's table). All its state is `nnx.Param`, in f32, with the logical
    names of its dims as `axes`.

    A layer is called by `block`, on x_BSD whose sequence is split over `tensor`; how layers are gathered, scanned,
    recomputed and piped is no business of theirs (`LayerStack`).
    """

    embedding: Embedding
    final_norm: RMSNorm
    head: Linear | None
    few_rows: FewRows | None = None
    """Product of the head for serving, of a weight (vocabulary, hidden size)."""
    origin: Origin | None = None
    """Place that the model was loaded from; None where it was made."""

    def save(self, directory: str | os.PathLike[str], *, dtype: str | None = None) -> str:
        """Write the model, as its weights are now, as a Hugging Face directory, and say what was written.

        The tokenizer and further files are those of what it was loaded from. Of an adapter's run the model and adapter
        are merged, on weights of the base as they are on disk.

        Args:
            directory: a new one.
            dtype: of the tensors: float32, bfloat16, float16 or float64; by default as the model has them.

        Raises UserError where `trainfw.load_model` did not return it, or the directory holds something.
        """
        if self.origin is None:
            raise UserError("save: expected a model that trainfw.load_model returned, whose tokenizer is known")
        return self.origin.save(self, path_text(directory, "directory", "where to write the model"), dtype)

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """x_BSD, the first layer's input, its sequence split over `tensor`."""
        return self.embedding(tokens_BS, jnp.dtype(self.compute_dtype))

    def context(self, positions_BS: jax.Array, segment_ids_BS: jax.Array | None, mask_BS: jax.Array | None) -> Any:
        """Return what all layers share: a pytree of arrays that are not differentiated."""
        return TokenPlaces(positions_BS, segment_ids_BS)

    @property
    def weighs_tokens(self) -> bool:
        """Tell whether layers read mask_BS."""
        return False

    @property
    def final_softcap(self) -> float | None:
        return None

    def __call__(
        self,
        tokens_BS: jax.Array,
        *,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """logits_BSV, f32. The arguments are those of `TokenModel.forward`."""
        return self.logits(self.forward(tokens_BS, segment_ids_BS=segment_ids_BS, positions_BS=positions_BS)[0])

    def forward(
        self,
        tokens_BS: jax.Array,
        *,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
        mask_BS: jax.Array | None = None,
        adapters: AdapterInputs | None = None,
    ) -> tuple[jax.Array, MoEStats | None]:
        if positions_BS is None:
            positions_BS = jnp.arange(tokens_BS.shape[1])[None]
        x_BSD, (_, stats) = self.stack.run(
            self.embed(tokens_BS),
            (positions_BS, segment_ids_BS, mask_BS if self.weighs_tokens else None),
            lambda side: self.context(*side),
            adapters=adapters,
        )
        return self.final_norm(x_BSD), stats

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """logits_BSV, f32, from the hidden states of `forward`; the vocabulary is split over `tensor`."""
        x_BSD = gather_sequence(x_BSD)
        if self.few_rows is not None:
            weight = self.embedding.table if self.head is None else self.head.kernel
            logits_BSV = of_few_rows(self.few_rows, x_BSD, weight.get_value())
        else:
            w, dims = self.head_weight()
            logits_BSV = wide_einsum(f"bsd,{dims}->bsv", x_BSD, w)
        return softcap(logits_BSV, self.final_softcap)

    def head_weight(self) -> tuple[jax.Array, HeadDims]:
        """See `TokenModel`. Tied, it is the embedding's table."""
        dtype = jnp.dtype(self.compute_dtype)
        if self.head is None:
            # An adapter of the embedding is not the head's: what PEFT does where they are tied.
            return dense(gathered_array(self.embedding.table, dtype), dtype), "vd"
        head = gathered(self.head, dtype)
        w = dense(head.kernel.get_value(), dtype)
        return (w if head.adapter is None else head.adapter.merged(w)), "dv"

    @property
    def head_learns(self) -> bool:
        weight = self.embedding.table if self.head is None else self.head.kernel
        return not isinstance(weight, Frozen) or (self.head is not None and self.head.adapter is not None)


_PROTOCOLS = {
    "tokens": ("TokenModel", ("forward", "head_weight")),
    "images": ("DenoisingModel", ("forward", "patches", "unpatched")),
}
"""Protocols of models by what they read, and the methods of each."""


def abstract_model(config: FamilyConfig, **options: Any) -> Any:
    """The model of a config with shapes in place of arrays, for which no memory is taken.

    `options` are those of `ModelOptions`.
    """
    return nnx.eval_shape(lambda: build_model(config, ModelOptions(**options), nnx.Rngs(0)))


def build_model(config: FamilyConfig, options: ModelOptions, rngs: nnx.Rngs) -> Any:
    """Return the model of a config, a `TokenModel` or a `DenoisingModel`.

    Raises UserError where somebody's own family makes none.
    """
    family = family_of(config)
    if not is_own(config.family):
        return family.build(config, options, rngs)
    with running("model.family", config.family, "build"):
        model: Any = family.build(config, options, rngs)
    wrong = f"model.family = {config.family!r}: its build returns "
    kind, parts = _PROTOCOLS[family.reads]
    if not (isinstance(model, nnx.Module) and all(hasattr(model, part) for part in parts)):
        raise UserError(f"{wrong}a {type(model).__name__}; expected an nnx.Module that is a trainfw.models.{kind}")
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes, name = variable.get_metadata().get("axes"), ".".join(map(str, path))
        if not (isinstance(variable, nnx.Param) and isinstance(axes, tuple) and len(axes) == len(variable.shape)):
            kind, shape = type(variable).__name__, tuple(variable.shape)
            raise UserError(
                f"{wrong}{name}, a {kind} of shape {shape} with axes {short(axes)}; expected an nnx.Param with a name "
                'for each of its dims, as in nnx.Param(value, axes=("embed", "mlp"))'
            )
    return model
