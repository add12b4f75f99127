"""Mixtures of experts: a router, many small feed-forward layers, and two ways to bring tokens to them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainfw import backends
from trainfw.backends import Backend
from trainfw.models.common.layers import MLP, PRODUCT, Linear, adapted_product, gate_with, normal
from trainfw.models.common.top_k import choose_top_k, top_k_problem
from trainfw.models.decoder.config import ModelConfig, MoEConfig
from trainfw.models.layer_shapes import Experts
from trainfw.parallel import all_gather, all_reduce, all_to_all, axis_index, axis_size, reduce_scatter

BLOCK = 128
"""Tokens counted by one matrix product: partial counts stay exact where its operands are rounded to bfloat16."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEStats:
    """Counts of one layer's router, f32: this device's share; the sum over all devices is the total.

    Every position of a row is counted, padding too: it is routed and takes up slots. The losses weigh a token as the
    cross-entropy does, by the mask.
    """

    balance: jax.Array
    """Sum over rows of L(row) times the row's tokens in the mask: Switch's load-balance loss (arXiv:2101.03961, eq. 4)
    for each sequence by itself, as in DeepSeek-V3 (arXiv:2412.19437, eq. 17-20):

        L = sum over experts of f * P,  f = E / (k * T) * (choices of the expert),  P = (sum of its softmax) / T

    for the T positions of the row,
    1 where all are chosen equally often. Of a row alone, so that it is the same however the batch is cut into
    microbatches or over devices."""
    z: jax.Array
    """Sum over tokens in the mask of logsumexp(logits)**2 (ST-MoE, arXiv:2202.08906, eq. 5)."""
    tokens: jax.Array
    dropped: jax.Array
    """Choices that found no slot."""
    load_E: jax.Array
    """Choices of each expert, those dropped included."""
    choices: jax.Array
    """Choices made: tokens * experts_per_token."""
    config: MoEConfig = field(metadata={"static": True})

    def loss(self) -> jax.Array:
        """Return both losses with their coefficients, summed over tokens."""
        return self.config.balance_loss * self.balance + self.config.z_loss * self.z

    def metrics(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """(total, count) of each metric, of the sums over all devices, of one layer or of layers stacked.

        Means over tokens and layers of the losses, the share of choices dropped, and `expert_load`, the share of a
        layer's choices that its busiest expert has, times E: 1 where all have the same, E where one has all.
        """
        choices, tokens = jnp.sum(self.choices), jnp.sum(self.tokens)
        busiest = jnp.sum(jnp.max(self.load_E, axis=-1)) * self.config.num_experts
        return {
            "balance_loss": (jnp.sum(self.balance), tokens),
            "router_z_loss": (jnp.sum(self.z), tokens),
            "dropped": (jnp.sum(self.dropped), choices),
            "expert_load": (busiest, choices),
        }


def backend_problems(config: ModelConfig, backend: Backend) -> Iterator[tuple[str, str]]:
    """List what of a mixture the backend cannot compute: (field, why)."""
    if config.moe is None:
        return
    if config.moe.dispatch == "dropless" and not backend.grouped_matmul:
        why = f"{backend} has no grouped matrix products, every expert would multiply every token; expected capacity"
        yield "moe.dispatch", why
    if problem := top_k_problem(config.moe.experts_per_token, backend):
        yield "moe.experts_per_token", problem


_expert_product = functools.partial(jnp.einsum, "eni,eio->eno")


class ExpertLinear(nnx.Module):
    """The kernels (E, in, out) of one linear map in every expert, f32."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str, str], *, std: float, rngs: nnx.Rngs):
        self.kernel = normal(rngs, shape, std, axes)
        self.adapter: Any = nnx.data(None)

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None = None) -> jax.Array:
        """Multiply each expert's rows of x (E, n, in) by its kernel; of x (n, in), the first `sizes_E[0]` by the first
        expert, and so on.
        """
        if sizes_E is None:
            return adapted_product(self, _expert_product, x)
        return adapted_product(self, jax.lax.ragged_dot, x, sizes_E)


class MoE(nnx.Module):
    """y = sum over a token's k experts of weight * expert(x), plus shared experts; in place of an `MLP`.

    The k experts are those with the largest softmax(x @ router), their weights that softmax, divided by its sum over
    the k where the config says so. Routing is in f32 whatever the dtype of x.

    Inside shard_map every device calls it with its own tokens (those along `tensor` all with the same) and with its
    own experts, E / expert of them, their F split over `tensor`: y is then a partial sum over `tensor`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, D, F, std = config.moe, config.hidden_size, config.intermediate_size, config.init_std
        assert moe is not None
        E = moe.num_experts
        self.config, self.activation = moe, config.activation
        self.router = Linear((D, E), ("embed", "router"), std=std, wide=True, rngs=rngs)
        into, out_of = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        self.gate = ExpertLinear((E, D, F), into, std=std, rngs=rngs)
        self.up = ExpertLinear((E, D, F), into, std=std, rngs=rngs)
        self.down = ExpertLinear((E, F, D), out_of, std=std, rngs=rngs)
        shared = moe.shared_intermediate_size
        self.shared = None if shared is None else MLP(D, shared, activation=config.activation, std=std, rngs=rngs)

    def __call__(
        self, x_BSD: jax.Array, mask_BS: jax.Array | None = None, *, dropless: bool = False
    ) -> tuple[jax.Array, MoEStats]:
        """(y_BSD in the dtype of x, stats).

        Args:
            mask_BS: weights of the tokens in the losses, f32; 1 by default.
            dropless: nothing is dropped, whatever the config says.
        """
        B, S, D = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        logits_TE, probabilities_TE, weights_TK, experts_TK = self._route(x_TD)
        grouped = backends.current().grouped_matmul
        if (self.config.dispatch == "capacity" and not dropless) or not grouped:
            # Without grouped products nothing is dropped where each expert has room for all.
            y_TD, dropped = self._capacity(x_TD, weights_TK, experts_TK, room=B * S if dropless else None)
        else:
            y_TD, dropped = self._dropless(x_TD, weights_TK, experts_TK), jnp.float32(0.0)
        y_BSD = y_TD.reshape(B, S, D)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, self._stats(
            jnp.ones((B, S)) if mask_BS is None else mask_BS, logits_TE, probabilities_TE, experts_TK, dropped
        )

    def _route(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """logits_TE, their softmax, the weights of the chosen (f32[T, k]) and which they are (i32[T, k])."""
        router_DE = self.router.kernel[...].astype(jnp.float32)
        # In full: GPUs would round the operands to TF32, and a choice between near equals would depend on it.
        logits_TE = jnp.matmul(x_TD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
        logits_TE = checkpoint_name(logits_TE, PRODUCT)
        probabilities_TE = jax.nn.softmax(logits_TE, axis=-1)
        _, experts_TK = choose_top_k(jax.lax.stop_gradient(probabilities_TE), self.config.experts_per_token)
        # A masked sum rather than what top_k returns, whose gradient would be a scatter.
        weights_TK = jnp.sum(jnp.where(self._chosen(experts_TK), probabilities_TE[:, None], 0.0), axis=-1)
        if self.config.normalize_weights:
            weights_TK = weights_TK / jnp.sum(weights_TK, axis=-1, keepdims=True)
        return logits_TE, probabilities_TE, weights_TK, experts_TK

    def _chosen(self, experts_TK: jax.Array) -> jax.Array:
        """bool[T, k, E]"""
        return experts_TK[..., None] == jnp.arange(self.config.num_experts)

    def _stats(
        self,
        mask_BS: jax.Array,
        logits_TE: jax.Array,
        probabilities_TE: jax.Array,
        experts_TK: jax.Array,
        dropped: jax.Array,
    ) -> MoEStats:
        E, k = self.config.num_experts, self.config.experts_per_token
        copies = axis_size("tensor")  # these compute all of it alike
        tokens, rows = logits_TE.shape[0], mask_BS.shape[0]
        weight_B1 = jnp.sum(mask_BS, axis=1, keepdims=True)
        load_BE = jnp.sum(self._chosen(experts_TK).reshape(rows, -1, E).astype(jnp.float32), axis=1)
        # Of the whole row; that of the probabilities is then linear, so each device adds its own part.
        length = tokens / rows * axis_size("context")
        of_row = all_reduce(jnp.concatenate([load_BE, weight_B1], axis=1), "context")
        frequency_BE = of_row[:, :-1] * of_row[:, -1:] * (E / (k * length * length))
        probability_BE = jnp.sum(probabilities_TE.reshape(rows, -1, E), axis=1)
        return MoEStats(
            balance=jnp.sum(frequency_BE * probability_BE) / copies,
            z=jnp.sum(jnp.square(jax.nn.logsumexp(logits_TE, axis=-1)) * mask_BS.reshape(-1)) / copies,
            tokens=jnp.sum(mask_BS) / copies,
            dropped=dropped / copies,
            load_E=jnp.sum(load_BE, axis=0) / copies,
            choices=jnp.float32(tokens * k / copies),
            config=self.config,
        )

    def _capacity(
        self, x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array, room: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(y_TD, choices dropped). Every device sends an expert at most C of its tokens.

            C = ceil(T * k / E * capacity_factor), 1 at least and T at most; or `room`

        Slots go to first choices before second ones, and so on, each in the order of the tokens, as in GShard
        (arXiv:2006.16668, algorithm 1) and Switch: a later token's first choice may take the slot of an earlier
        token's second, so where anything is dropped the past is not wholly blind to the future. Two all-to-alls over
        `expert` of E * C rows each way.
        """
        T, D = x_TD.shape
        config, devices = self.config, axis_size("expert")
        E = config.num_experts
        C = room or Experts(E, config.experts_per_token, config.capacity_factor).slots(T)
        slots_TK, tokens_EC, choices_EC = assign_slots(experts_TK, E, C)
        rows = take_rows(x_TD, tokens_EC.reshape(-1), slots_TK)
        x_ECD = all_to_all(rows.reshape(E, C, D), "expert", 0, 1)
        assert x_ECD.shape[0] == self.gate.kernel.shape[0] == E // devices
        y_ECD = self.down(gate_with(self.activation, self.gate(x_ECD), self.up(x_ECD)))
        y_ECD = all_to_all(y_ECD, "expert", 1, 0)
        y_TD = weigh(take_rows(y_ECD.reshape(E * C, D), slots_TK.reshape(-1), choices_EC.reshape(-1, 1)), weights_TK)
        return y_TD, jnp.sum((slots_TK == E * C).astype(jnp.float32))

    def _dropless(self, x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array) -> jax.Array:
        """y_TD. The choices sorted by expert, and one grouped product (jax.lax.ragged_dot) over all experts.

        Along `expert` every device gathers all tokens and returns what its own experts make of them (all_gather and
        reduce_scatter of T * expert rows, for static shapes): its rows take `expert` times the memory of one device's
        choices, though only about one in `expert` is computed. On GPUs and TPUs ragged_dot computes the chosen only;
        on CPUs every expert on every row, masked.
        """
        local = self.gate.kernel.shape[0]
        assert local == self.config.num_experts // axis_size("expert")
        x_TD, weights_TK, experts_TK = (all_gather(x, "expert", 0) for x in (x_TD, weights_TK, experts_TK))
        T, k = experts_TK.shape
        mine_N = experts_TK.reshape(-1) - axis_index("expert") * local
        mine_N = jnp.where((mine_N >= 0) & (mine_N < local), mine_N, local)  # others' sort last
        sizes_E = jnp.sum(mine_N[:, None] == jnp.arange(local), axis=0, dtype=jnp.int32)
        order_N = jnp.argsort(mine_N)
        place_N = jnp.argsort(order_N)
        # Rows of others' experts read and write nothing: what ragged_dot makes of them is not defined.
        taken = jnp.sum(sizes_E)
        index_N = jnp.arange(T * k)
        choices_N = jnp.where(index_N < taken, order_N, T * k)
        place_N = jnp.where(place_N < taken, place_N, T * k)
        rows_ND = take_rows(x_TD, jnp.where(index_N < taken, order_N // k, T), place_N.reshape(T, k))
        hidden_NF = gate_with(self.activation, self.gate(rows_ND, sizes_E), self.up(rows_ND, sizes_E))
        y_ND = self.down(hidden_NF, sizes_E)
        y_TD = weigh(take_rows(y_ND, place_N, choices_N[:, None]), weights_TK)
        return reduce_scatter(y_TD, "expert", 0)


def weigh(rows_ND: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """y_TD: each token's k rows times its k weights, added up in f32; in the dtype of the rows."""
    rows_TKD = rows_ND.reshape(*weights_TK.shape, -1).astype(jnp.float32)
    return jnp.sum(weights_TK[..., None] * rows_TKD, axis=1).astype(rows_ND.dtype)


@jax.custom_vjp
def take_rows(x_RD: jax.Array, index_N: jax.Array, back_RJ: jax.Array) -> jax.Array:
    """Rows `index_N` of x; zeros where the index is R.

    Args:
        back_RJ: which of the N results are row r of x, up to J of them; N for none. By it the gradient is a gather and
            a sum over J, with no scatter, which accelerators do slowly and in no fixed order.
    """
    return _rows(x_RD, index_N)


def _rows(x_RD: jax.Array, index: jax.Array) -> jax.Array:
    taken = jnp.take(x_RD, index, axis=0, mode="clip")
    return jnp.where((index < x_RD.shape[0])[..., None], taken, jnp.zeros((), x_RD.dtype))


def _take_backward(back_RJ: jax.Array, grad_ND: jax.Array) -> tuple[jax.Array, None, None]:
    grad_RJD = _rows(grad_ND, back_RJ).astype(jnp.float32)
    return jnp.sum(grad_RJD, axis=1).astype(grad_ND.dtype), None, None


take_rows.defvjp(lambda x_RD, index_N, back_RJ: (_rows(x_RD, index_N), back_RJ), _take_backward)


def assign_slots(experts_TK: jax.Array, E: int, C: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assign to each choice one of the C slots of its expert: (slots_TK, tokens_EC, choices_EC), i32.

    slots_TK is expert * C + place, E * C for a choice that is dropped. tokens_EC and choices_EC say whose a slot is:
    the token, and the choice as token * k + rank; T and T * k for a slot that is empty.

    No sort, no scatter and no integer reduction: places are counted by products of zeros and ones, and the slots'
    owners found by a search among these counts, first for a block of tokens and then within it. All counts are f32,
    exact below 2**24 choices.
    """
    T, k = experts_TK.shape
    block = min(BLOCK, T)
    per_rank = -(-T // block)
    n = k * per_rank  # blocks, first choices first
    padding = ((0, per_rank * block - T), (0, 0))
    experts_nb = jnp.pad(experts_TK, padding, constant_values=E).T.reshape(n, block)
    chosen_nbE = experts_nb[..., None] == jnp.arange(E)
    through_nbE = _running_sum(chosen_nbE)
    end_nE = _running_sum(through_nbE[None, :, -1])[0]
    total_nE = through_nbE[:, -1]

    place_nb = jnp.sum(jnp.where(chosen_nbE, (end_nE - total_nE)[:, None] + through_nbE - 1, 0.0), axis=-1)
    place_TK = place_nb.reshape(k, -1)[:, :T].T.astype(jnp.int32)
    slots_TK = jnp.where(place_TK < C, experts_TK * C + place_TK, E * C)

    # The slot's place among its expert's choices, then in the block that has it, then the first token to reach it.
    place_C = jnp.arange(C, dtype=jnp.float32)
    before_nEC = end_nE[:, :, None] <= place_C
    block_EC = jnp.sum(before_nEC.astype(jnp.float32), axis=0)
    rest_EC = place_C - jnp.sum(jnp.where(before_nEC, total_nE[:, :, None], 0.0), axis=0)
    row_EC = jnp.minimum(block_EC, n - 1).astype(jnp.int32) * E + jnp.arange(E)[:, None]
    within_ECb = jnp.take(through_nbE.transpose(0, 2, 1).reshape(n * E, block), row_EC, axis=0, mode="clip")
    offset_EC = jnp.sum((within_ECb <= rest_EC[..., None]).astype(jnp.float32), axis=-1)
    ends = jnp.arange(1, k, dtype=jnp.float32) * per_rank
    rank_EC = jnp.sum((block_EC[..., None] >= ends).astype(jnp.float32), axis=-1)
    token_EC = (block_EC - rank_EC * per_rank) * block + offset_EC
    filled_EC = block_EC < n
    tokens_EC = jnp.where(filled_EC, token_EC, T).astype(jnp.int32)
    choices_EC = jnp.where(filled_EC, tokens_EC * k + rank_EC.astype(jnp.int32), T * k)
    return slots_TK, tokens_EC, choices_EC


def _running_sum(x_nbE: jax.Array) -> jax.Array:
    """Sums over the second dim up to and with each index, f32. Values up to 256 are exact in bfloat16."""
    size = x_nbE.shape[1]
    lower = jnp.tril(jnp.ones((size, size), jnp.bfloat16))
    return jnp.einsum("ij,njE->niE", lower, x_nbE.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
