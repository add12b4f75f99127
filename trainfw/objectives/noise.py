"""Schedules of noise: how much of an image and of noise there is at each time, and which times drawing visits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from trainfw.objectives.config import FIRST_BETA, LAST_BETA, Betas, Prediction

TIMES = 1000
"""End of the scale of the times that models are given: steps of DDPM, and thousandths of a flow."""


def shifted(times: np.ndarray, shift: float) -> np.ndarray:
    """Move times in [0, 1] towards noise, as larger images need (Esser et al., arXiv:2403.03206, eq. 23)."""
    return shift * times / (1.0 + (shift - 1.0) * times)


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: x = (1 - s) image + s noise for s in [0, 1], of which the model is given 1000 s.

    It predicts the velocity, noise - image.
    """

    shift: float = 1.0
    """Above 1, more of the steps are spent where there is much noise (`shifted`)."""
    spacing: Literal["linspace", "trailing"] = "linspace"
    """Times of n steps, before the shift: `linspace`, evenly from 1 to a thousandth, then 0, as diffusers' scheduler
    has them; `trailing`, from 1 in n equal steps to 0, as its pipeline of FLUX has."""
    prediction: ClassVar[Literal["velocity"]] = "velocity"


@dataclass(frozen=True)
class DDPMSchedule:
    """Noise in 1000 steps (Ho et al., arXiv:2006.11239): x = a image + b noise with a^2 + b^2 = 1, a^2 of `signal`.

    The model predicts the noise (`epsilon`), or a noise - b image (`v`, Salimans and Ho, arXiv:2202.00512).
    """

    betas: Betas = "linear"
    """Noise that each step adds: from `beta_start` to `beta_end` evenly, or evenly in their roots (`scaled_linear`); or
    a cosine's (`squaredcos_cap_v2`, Nichol and Dhariwal, arXiv:2102.09672), which reads neither."""
    beta_start: float = FIRST_BETA
    beta_end: float = LAST_BETA
    prediction: Prediction = "epsilon"
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    """Steps that drawing visits, as in table 2 of Lin et al., arXiv:2305.08891: `trailing` begins at the last, where
    nothing but noise is left, `leading` ends at the first, `linspace` does both."""
    offset: int = 0
    """Added to the steps of `leading`."""

    def signal(self) -> np.ndarray:
        """Return a^2 of every step, f64[1000], rounded where diffusers' float32 rounds."""
        betas: np.ndarray
        match self.betas:
            case "linear":
                betas = np.linspace(self.beta_start, self.beta_end, TIMES)
            case "scaled_linear":
                roots = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), TIMES, dtype=np.float32)
                betas = roots * roots
            case "squaredcos_cap_v2":
                angles = (np.arange(TIMES + 1) / TIMES + 0.008) / 1.008 * math.pi / 2
                whole = np.cos(angles) ** 2
                betas = np.minimum(1.0 - whole[1:] / whole[:-1], 0.999)
        return np.cumprod((np.float32(1) - betas.astype(np.float32)).astype(np.float64))


Schedule: TypeAlias = FlowSchedule | DDPMSchedule
