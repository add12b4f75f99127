"""Learning to take noise out of images: at random times of a flow, or of DDPM's steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.models import Condition, DenoisingModel
from trainfw.objectives.config import Betas, Prediction, Times
from trainfw.objectives.draws import KEEP, NOISE, TIME, normal_rows, uniform_rows
from trainfw.objectives.noise import TIMES, DDPMSchedule, FlowSchedule, shifted
from trainfw.objectives.objective import Batch, Draw, Mean, Models, Sums
from trainfw.objectives.schema import Field, ImageShape, Schema, image_rows
from trainfw.parallel import axis_size
from trainfw.scopes import LOSS


@dataclass(frozen=True)
class _Denoising:
    """A loss of noised images."""

    image: ImageShape
    unit: ClassVar[str] = "image"
    roles: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Literal["images"]] = "images"

    def schema(self, batch: int, sequence: int) -> Schema:
        """Return that of images with `noise`, `time` and, where there is a condition, `keep`."""
        rows = image_rows(batch, self.image)
        drawn = {"noise": rows.fields["image"], "time": Field(("batch",), np.float32)}
        if self.image.conditioning != "none":
            drawn["keep"] = drawn["time"]
        return Schema({**rows.fields, **drawn}, rows.sizes)

    def _drawn(
        self, batch: Mapping[str, np.ndarray], seed: int, time_B: np.ndarray, drop_condition: float
    ) -> dict[str, np.ndarray]:
        row_B = batch["row"]
        arrays = {name: batch[name] for name in image_rows(len(row_B), self.image).fields}
        arrays["noise"] = normal_rows(seed, row_B, self.image.shape, NOISE)
        arrays["time"] = time_B.astype(np.float32)
        if self.image.conditioning != "none":
            arrays["keep"] = (uniform_rows(seed, row_B, KEEP) >= drop_condition).astype(np.float32)
        return arrays


@dataclass(frozen=True)
class FlowMatching(_Denoising):
    """Squared error of a rectified flow's velocity (Liu et al., arXiv:2209.03003), summed over images; `FlowSchedule`.

    A time is drawn for each image, evenly or as the logistic function of a normal number (Esser et al.,
    arXiv:2403.03206, section 3.1), and then shifted towards noise (eq. 23 there).
    """

    times: Times = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    """Standard deviation of the normal number, where `times` is logit_normal."""
    shift: float = 1.0
    drop_condition: float = 0.1
    """Probability that an image's condition is left out in training, so that drawing can be guided by the difference
    (Ho and Salimans, arXiv:2207.12598)."""

    @property
    def schedule(self) -> FlowSchedule:
        return FlowSchedule(self.shift)

    def drawn(self, batch: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Return the batch with noise, times and the conditions to keep, drawn for each row by its number."""
        if self.times == "uniform":
            time_B = uniform_rows(seed, batch["row"], TIME)
        else:
            normal_B = normal_rows(seed, batch["row"], (1,), TIME)[:, 0].astype(np.float64)
            time_B = 1.0 / (1.0 + np.exp(-(self.logit_mean + self.logit_std * normal_B)))
        return self._drawn(batch, seed, TIMES * shifted(time_B, self.shift), self.drop_condition)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return the loss, and `loss` as its mean over images."""
        noise, image, time_B = batch["noise"], batch["image"], batch["time"]
        share_B = time_B * (1.0 / TIMES)
        noisy = image + _per_row(share_B) * (noise - image)
        return _squared_error(models, noisy, noise - image, batch, batch["weight"], draw)


@dataclass(frozen=True)
class DDPM(_Denoising):
    """Squared error of the noise in an image, or of v, at a random step of 1000, summed over images; `DDPMSchedule`."""

    prediction: Prediction = "epsilon"
    betas: Betas = "linear"
    beta_start: float = DDPMSchedule.beta_start
    beta_end: float = DDPMSchedule.beta_end
    min_snr_gamma: float | None = None
    """Largest weight of an image's error, as an error of the image rather than of what is predicted: its
    signal-to-noise ratio, but at most this (Hang et al., arXiv:2303.09556, section 3.4)."""
    drop_condition: float = 0.1

    @property
    def schedule(self) -> DDPMSchedule:
        return DDPMSchedule(self.betas, self.beta_start, self.beta_end, self.prediction)

    def drawn(self, batch: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Return the batch with noise, steps and the conditions to keep, drawn for each row by its number."""
        step_B = np.floor(TIMES * uniform_rows(seed, batch["row"], TIME))
        return self._drawn(batch, seed, step_B, self.drop_condition)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return the loss, and `loss` as its mean over images, both with the weights of min-SNR."""
        noise, image = batch["noise"], batch["image"]
        levels_B3 = jnp.take(self._levels(), batch["time"].astype(jnp.int32), axis=0, mode="clip")
        image_part, noise_part = (_per_row(levels_B3[:, i]) for i in (0, 1))
        noisy = image_part * image + noise_part * noise
        target = noise if self.prediction == "epsilon" else image_part * noise - noise_part * image
        return _squared_error(models, noisy, target, batch, batch["weight"] * levels_B3[:, 2], draw)

    def _levels(self) -> jax.Array:
        """Return for every step the parts of image and noise, and the weight of the error, f32[1000, 3]."""
        signal_T = self.schedule.signal()
        weight_T = np.ones(TIMES)
        if self.min_snr_gamma is not None:
            snr_T = signal_T / (1 - signal_T)
            weight_T = np.minimum(snr_T, self.min_snr_gamma) / (snr_T if self.prediction == "epsilon" else snr_T + 1)
        return jnp.asarray(np.stack([np.sqrt(signal_T), np.sqrt(1 - signal_T), weight_T], axis=1), jnp.float32)


def _per_row(x_B: jax.Array) -> jax.Array:
    return x_B[:, None, None, None]


def _squared_error(
    models: Models, noisy: jax.Array, target: jax.Array, batch: Batch, weight_B: jax.Array, draw: Draw
) -> tuple[jax.Array, Sums]:
    """Return the weighted sum of images' mean squared errors, of this device's patches.

    Validation leaves out no condition. Channels of the prediction beyond the image's are of a variance, not learnt.
    """
    model: DenoisingModel = models["learner"]
    condition = Condition(
        label_B=batch.get("label"),
        caption_BTF=batch.get("caption"),
        caption_mask_BT=batch.get("caption_mask"),
        keep_B=batch.get("keep") if draw.training else None,
    )
    prediction_BSO = model.forward(noisy, batch["time"], condition, adapters=draw.adapters)
    with jax.named_scope(LOSS):
        return _error(model, prediction_BSO, target, weight_B, batch["weight"])


def _error(
    model: DenoisingModel, prediction_BSO: jax.Array, target: jax.Array, weight_B: jax.Array, counted_B: jax.Array
) -> tuple[jax.Array, Sums]:
    target_BSO = model.patches(target)
    if prediction_BSO.shape != target_BSO.shape:
        channels, (rows, patches, size) = target.shape[-1], target_BSO.shape
        by_channel = prediction_BSO.reshape(rows, patches, size // channels, -1)[..., :channels]
        prediction_BSO = by_channel.reshape(target_BSO.shape)
    error_B = jnp.sum(jnp.square(prediction_BSO - target_BSO), axis=(1, 2)) * (target.shape[0] / target.size)
    total = jnp.sum(error_B * weight_B)
    # Devices along these compute different patches of the same images.
    count = jnp.sum(counted_B) * (1.0 / (axis_size("tensor") * axis_size("context")))
    return total, {"loss": Mean(total, count)}
