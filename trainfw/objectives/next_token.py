from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from trainfw.models import TokenModel
from trainfw.objectives.head import cross_entropy, head_inputs
from trainfw.objectives.objective import Batch, Draw, Mean, Models, Reads, Sums
from trainfw.objectives.schema import Schema, token_rows
from trainfw.parallel import axis_size


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, summed over the tokens of `loss_mask`."""

    chunk: int = 2048
    """Tokens on a device whose logits exist at a time."""
    mask_documents: bool = True
    """A token attends to its own segment only."""
    z_loss: float = 0.0
    """Coefficient of log(Z)^2, in training (PaLM, arXiv:2204.02311, section 5)."""
    unit: ClassVar[str] = "token"
    reads: ClassVar[Reads] = "tokens"
    roles: ClassVar[tuple[str, ...]] = ()

    def schema(self, batch: int, sequence: int) -> Schema:
        return token_rows(batch, sequence)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return the loss (nats, with z_loss * log(Z)^2 and the routers' losses added), and sums.

        These are `loss` (nats, without what was added) and, of a mixture of experts, `router`.
        """
        model: TokenModel = models["learner"]
        x_BSD, stats = model.forward(
            batch["tokens"],
            segment_ids_BS=batch["segment_ids"] if self.mask_documents else None,
            positions_BS=batch["positions"],
            mask_BS=batch["loss_mask"],
            adapters=draw.adapters,
        )
        head, x_ND, weight = head_inputs(model, x_BSD, self.chunk)
        mask_N, z_loss = batch["loss_mask"].reshape(-1), self.z_loss if draw.training else 0.0
        objective, nats = cross_entropy(head, z_loss, x_ND, weight, batch["targets"].reshape(-1), mask_N)
        share = 1.0 / axis_size("tensor")
        objective, sums = objective * share, {"loss": Mean(nats * share, jnp.sum(mask_N) * share)}
        if stats is None:
            return objective, sums
        return objective + jnp.sum(stats.loss()), sums | {"router": stats}
