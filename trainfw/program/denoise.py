"""The step of a sampler that the devices compute: a denoising model's prediction, guided by its condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from trainfw.models import Condition, DenoisingModel
from trainfw.program.fit import Fit
from trainfw.program.models import ModelSet

Inputs = dict[str, Any]
"""Arrays of one call by name: `image` and `time`, those of the condition as in a batch, and `guidance` f32[]."""
_CONDITION = ("label", "caption", "caption_mask")
DENOISED = ("image", "time", *_CONDITION)
"""Arrays of a batch that `denoise` reads."""


@dataclass(frozen=True)
class LocalDenoising:
    """Prediction of a model on one device's rows.

    With a condition it is guided: u + guidance (c - u), of the predictions c with the condition and u without it, which
    are computed in one batch (Ho and Salimans, arXiv:2207.12598).
    """

    fit: Fit
    models: ModelSet

    def __call__(self, params: Any, frozen: Any, inputs: Inputs) -> jax.Array:
        """Return the prediction for each image, f32 in the shape of `image`."""
        with self.fit.tracing():
            model: DenoisingModel = self.models.learner(params, frozen)
            image, time = inputs["image"], inputs["time"]
            condition = {name: inputs[name] for name in _CONDITION if name in inputs}
            if not condition:
                return self._predicted(model, image, time, Condition())
            rows = image.shape[0]
            keep = jnp.concatenate([jnp.ones(rows), jnp.zeros(rows)])
            twice = {name: jnp.concatenate([x, x]) for name, x in condition.items()}
            both = self._predicted(
                model, jnp.concatenate([image, image]), jnp.concatenate([time, time]), _condition(twice, keep)
            )
            with_it, without = jnp.split(both, 2)
            return without + inputs["guidance"] * (with_it - without)

    def _predicted(self, model: DenoisingModel, image: jax.Array, time: jax.Array, condition: Condition) -> jax.Array:
        whole = model.unpatched(model.forward(image, time, condition))
        return whole[..., : image.shape[-1]]  # of a model that predicts variances too, the first half


def _condition(inputs: Inputs, keep: jax.Array) -> Condition:
    label, caption, mask = map(inputs.get, _CONDITION)
    return Condition(label, caption, mask, keep)
