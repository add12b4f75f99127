"""The step of a sampler that the devices compute: a denoising model's prediction, guided by its condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from trainfw.models import AdapterInputs, Condition, DenoisingModel
from trainfw.program.fit import Fit
from trainfw.program.models import ModelSet
from trainfw.sampling import guided

Inputs = dict[str, Any]
"""Arrays of one call by name: `image` and `time`, those of the condition as in a batch, and `guidance` f32[].

Of a model with several adapters (`trainfw.adapters.attach_bank`) also `adapter`, i32[batch]: that of each row.
"""
DENOISED = ("image", "time", "label", "caption", "caption_mask")
"""Arrays of a batch that `denoise` reads."""


@dataclass(frozen=True)
class LocalDenoising:
    """Prediction of a model on one device's rows; with a condition, `trainfw.sampling.guided`."""

    fit: Fit
    models: ModelSet

    def __call__(self, params: object, frozen: Mapping[str, object], inputs: Inputs) -> jax.Array:
        """Return the prediction for each image, f32 in the shape of `image`."""
        with self.fit.tracing():
            model: DenoisingModel = self.models.learner(params, frozen)

            def predict(image: jax.Array, time: jax.Array, condition: Condition) -> jax.Array:
                adapters = None
                if "adapter" in inputs:  # guided, there are as many rows again
                    repeats = image.shape[0] // inputs["adapter"].shape[0]
                    adapters = AdapterInputs(rows_B=jnp.tile(inputs["adapter"], repeats))
                whole = model.unpatched(model.forward(image, time, condition, adapters=adapters))
                return whole[..., : image.shape[-1]]  # what follows is of variances

            image, time = inputs["image"], inputs["time"]
            if "guidance" not in inputs:
                return predict(image, time, Condition())
            condition = Condition(inputs.get("label"), inputs.get("caption"), inputs.get("caption_mask"))
            return guided(predict)(image, time, condition, inputs["guidance"])
