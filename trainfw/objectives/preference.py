"""Learning from pairs: of two completions of a prompt, the model is to prefer the chosen one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from trainfw.models import MoEStats, TokenModel
from trainfw.objectives.head import head_inputs, token_nats
from trainfw.objectives.objective import Batch, Draw, Mean, Models, Reads, Sums
from trainfw.objectives.schema import Schema, token_rows
from trainfw.parallel import all_reduce, axis_size

PreferenceLoss = Literal["dpo", "ipo", "simpo", "orpo"]
_WITH_REFERENCE = ("dpo", "ipo")
_ABSENT = -1.0
"""A mean log-likelihood in the place of a pair that is not there, of which every loss is finite."""


@dataclass(frozen=True)
class Preference:
    """A loss of pairs, summed over the pairs of a batch.

    With the log-likelihood L of a completion (of its tokens in `loss_mask`), that of the reference R, their means over
    tokens l and r, c the chosen and d the rejected completion:

        dpo    -log sigmoid(beta ((Lc - Rc) - (Ld - Rd)))           Rafailov et al., arXiv:2305.18290, eq. 7
        ipo    ((lc - rc) - (ld - rd) - 1 / (2 beta))^2             Azar et al., arXiv:2310.12036, eq. 17, of means over
                                                                    tokens, as its authors use it (TRL says so)
        simpo  -log sigmoid(beta (lc - ld) - margin)                Meng et al., arXiv:2405.14734, eq. 6
        orpo   -lc - beta log sigmoid(log odds(lc) - log odds(ld))  Hong et al., arXiv:2403.07691, eq. 6 and 7, with
               log odds(l) = l - log(1 - exp(l))
    """

    kind: PreferenceLoss
    beta: float
    margin: float
    pairs_per_row: int
    """Pairs at most in a row: its segments."""
    chunk: int = 2048
    """Tokens on a device whose logits exist at a time."""
    unit: ClassVar[str] = "pair"
    reads: ClassVar[Reads] = "tokens"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("reference",) if self.kind in _WITH_REFERENCE else ()

    def schema(self, batch: int, sequence: int) -> Schema:
        """Return that of pairs of packed rows: the chosen completions in the first, the rejected in the second.

        A pair is the same segment of both.
        """
        return token_rows(batch, sequence, group=2)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return the loss with the routers' losses added, and sums.

        These are `loss`, `reward_margin` (beta times what is to be above zero: mean log-likelihoods' difference for
        simpo and orpo, else that of L - R), `preference_accuracy` (the share of pairs in which it is above zero; one
        in which it is zero, as at the start, counts half), and with a reference `kl`: the mean of L - R over all
        completions, an estimate of the divergence on texts that are not the model's own.
        """
        rows = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
        number_K = jnp.arange(1, self.pairs_per_row + 1, dtype=jnp.int32)
        # Which tokens count for each pair of a row.
        member_RSK = (rows["segment_ids"][..., None] == number_K) * rows["loss_mask"][..., None]
        count_RK = all_reduce(jnp.sum(member_RSK, 1), "context")
        pairs, per_token_RK = batch["tokens"].shape[0], 1.0 / jnp.maximum(count_RK, 1.0)
        # The routers' losses are means over a pair's tokens, as the loss counts pairs.
        weight_RS = jnp.einsum("rsk,rk->rs", member_RSK, per_token_RK) / 2
        nats_RK, router = _nats(models["learner"], rows, member_RSK, weight_RS, self.chunk, draw.of_groups(2))
        present_BK = jnp.min((count_RK.reshape(pairs, 2, -1) > 0).astype(jnp.float32), axis=1)
        likelihood_B2K = -nats_RK.reshape(pairs, 2, -1)
        per_token_B2K = per_token_RK.reshape(pairs, 2, -1)
        means = {}
        if "reference" in models:
            reference_RK, _ = _nats(models["reference"], rows, member_RSK, weight_RS, self.chunk, Draw(training=False))
            likelihood_B2K += jax.lax.stop_gradient(reference_RK).reshape(pairs, 2, -1)
            means["kl"] = jnp.mean(likelihood_B2K, 1)
        mean_B2K = jnp.where(present_BK[:, None] > 0, likelihood_B2K * per_token_B2K, _ABSENT)
        loss_BK = self._losses(likelihood_B2K, mean_B2K)
        preferred_B2K = likelihood_B2K if "reference" in models else mean_B2K
        margin_BK = preferred_B2K[:, 0] - preferred_B2K[:, 1]
        means |= {"loss": loss_BK, "reward_margin": self.beta * margin_BK}
        means["preference_accuracy"] = (jnp.sign(margin_BK) + 1) / 2
        # Devices along these compute the same pairs.
        share = 1.0 / (axis_size("tensor") * axis_size("context"))
        count = jnp.sum(present_BK) * share
        sums: Sums = {name: Mean(jnp.sum(x_BK * present_BK) * share, count) for name, x_BK in means.items()}
        if router is None:
            return sums["loss"].total, sums
        return sums["loss"].total + jnp.sum(router.loss()), sums | {"router": router}

    def _losses(self, likelihood_B2K: jax.Array, mean_B2K: jax.Array) -> jax.Array:
        """Return the loss of each pair, of its log-likelihoods (or of L - R) and of their means over tokens."""
        difference_BK, mean_difference_BK = (x[:, 0] - x[:, 1] for x in (likelihood_B2K, mean_B2K))
        match self.kind:
            case "dpo":
                return -jax.nn.log_sigmoid(self.beta * difference_BK)
            case "ipo":
                return jnp.square(mean_difference_BK - 1 / (2 * self.beta))
            case "simpo":
                return -jax.nn.log_sigmoid(self.beta * mean_difference_BK - self.margin)
            case "orpo":
                log_odds_B2K = mean_B2K - jnp.log(-jnp.expm1(mean_B2K))
                return -mean_B2K[:, 0] - self.beta * jax.nn.log_sigmoid(log_odds_B2K[:, 0] - log_odds_B2K[:, 1])


def _nats(
    model: TokenModel, rows: Batch, member_RSK: jax.Array, weight_RS: jax.Array, chunk: int, draw: Draw
) -> tuple[jax.Array, MoEStats | None]:
    """Return (-log-likelihood of each completion, what the routers did)."""
    x_RSD, router = model.forward(
        rows["tokens"],
        segment_ids_BS=rows["segment_ids"],
        positions_BS=rows["positions"],
        mask_BS=weight_RS,
        adapters=draw.adapters,
    )
    nats_N = token_nats(*head_inputs(model, x_RSD, chunk), rows["targets"].reshape(-1))
    nats_RK = jnp.einsum("rs,rsk->rk", nats_N.reshape(weight_RS.shape), member_RSK)
    return all_reduce(nats_RK, "context"), router
