from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from trainfw.models import Transformer
from trainfw.program.metrics import Mean

Batch = dict[str, Any]
"""`tokens`, `targets`, `segment_ids`, `positions` (int32) and `loss_mask` (float32), each (B, S)."""


def next_token_loss(
    model: Transformer, batch: Batch, z_loss: float, *, mask_documents: bool = True
) -> tuple[jax.Array, dict[str, Mean]]:
    """Cross-entropy of the next token, summed (not averaged) over the unmasked tokens.

    With `mask_documents` a token attends to its own segment only.

    Returns the objective (nats, with z_loss * log(Z)^2 added) and the metric `loss` (nats, without it).
    """
    segment_ids_BS = batch["segment_ids"] if mask_documents else None
    logits_BSV = model(batch["tokens"], segment_ids_BS=segment_ids_BS, positions_BS=batch["positions"])
    log_z_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    # A masked sum rather than a gather: it stays local where the vocabulary is split over devices.
    vocab_V = jnp.arange(logits_BSV.shape[-1], dtype=jnp.int32)
    target_logit_BS = jnp.sum(jnp.where(vocab_V == batch["targets"][..., None], logits_BSV, 0.0), axis=-1)
    mask_BS = batch["loss_mask"]
    nats = jnp.sum((log_z_BS - target_logit_BS) * mask_BS)
    objective = nats + z_loss * jnp.sum(jnp.square(log_z_BS) * mask_BS) if z_loss else nats
    return objective, {"loss": Mean(nats, jnp.sum(mask_BS))}
