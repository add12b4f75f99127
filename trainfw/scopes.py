"""Names of the `jax.named_scope`s by which a plan finds parts of a program: for models of your own, too."""

from __future__ import annotations

ATTENTION = "attention_core"
"""Attention between its projections: the scores, their softmax, and the products with the values."""
LOSS = "loss"
"""The output head's product and a loss of what it returns; of models of images, the error of what they predict."""
LOSS_GRADIENT = "loss_gradient"
"""Products of the loss's gradient, which the forward pass computes beside the loss."""
