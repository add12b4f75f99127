from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PositiveFloat, model_validator

from trainfw.config import Config, invalid
from trainfw.errors import did_you_mean
from trainfw.pieces import is_own

PREFERENCES = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
"""Losses of pairs, each with its default beta: the papers' or TRL's."""
DIFFUSION = ("flow_matching", "ddpm")
"""Losses of models that take noise out of images."""
IMAGES = (*DIFFUSION, "reconstruction")
OBJECTIVES = ("next_token", *PREFERENCES, *IMAGES)

Times: TypeAlias = Literal["uniform", "logit_normal"]
Betas: TypeAlias = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Prediction: TypeAlias = Literal["epsilon", "v"]
ReconstructionError: TypeAlias = Literal["l1", "l2"]
FIRST_BETA, LAST_BETA = 0.0001, 0.02
"""First and last beta of `ddpm` by default: Ho et al., arXiv:2006.11239, section 4."""
_Beta: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
_OF_ONE = {
    **dict.fromkeys(("times", "logit_mean", "logit_std", "shift"), ("flow_matching",)),
    **dict.fromkeys(("prediction", "betas", "beta_start", "beta_end", "min_snr_gamma"), ("ddpm",)),
    "drop_condition": DIFFUSION,
    **dict.fromkeys(("error", "kl_weight"), ("reconstruction",)),
}
"""Keys of images' losses, and which have them."""


class ObjectiveConfig(Config):
    """Objective: the loss, and its settings."""

    name: str = "next_token"
    """`next_token`: every token of the text, or those of examples that are to be learnt. Of pairs (`data.format:
    preferences`): `dpo` and `ipo`, which compare the model with the one it starts from (with an adapter, that is the
    model without it, at no memory more); `simpo` and `orpo`, which need no other model. Of images
    (`data.format: images`): `flow_matching`, which learns the velocity of a rectified flow, and `ddpm`, which learns
    the noise that was added in some of 1000 steps; and `reconstruction`, of autoencoders: to make images again of their
    latents. Or your own, `package.module:Name`: see `trainfw.objectives.Objective`."""
    beta: PositiveFloat | None = None
    """Scale of a loss of pairs. `dpo`: how close to stay to the reference (default 0.1); `ipo`: likewise, 1 / (2 beta)
    is the margin that is aimed at (0.1); `simpo`: scale of the rewards (2.0); `orpo`: weight of the odds ratio (0.1).
    """
    margin: float = Field(default=0.0, ge=0)
    """Margin of `simpo`: by how much the reward of the chosen completion is to exceed the other's."""
    times: Times | None = None
    """Times of `flow_matching`: `uniform` (default), or `logit_normal`, which has more in the middle."""
    logit_mean: float | None = None
    """Mean of the normal number of which `logit_normal` takes the logistic function (default 0): above it, there is
    more noise."""
    logit_std: PositiveFloat | None = None
    """Standard deviation of that number (default 1)."""
    shift: PositiveFloat | None = None
    """Shift of the times of `flow_matching`, in training and in drawing: s becomes shift s / (1 + (shift - 1) s).
    Above 1 (default) there is more noise, as large images need; 3 in Stable Diffusion 3."""
    prediction: Prediction | None = None
    """Target of `ddpm`: the noise (`epsilon`, default), or `v`, the noise's part of noise less that of the image."""
    betas: Betas | None = None
    """Noise that each of `ddpm`'s 1000 steps adds: `linear` (default), `scaled_linear` or `squaredcos_cap_v2`, the
    cosine, as diffusers names them."""
    beta_start: _Beta | None = None
    """Beta of the first step (default 0.0001); not of the cosine."""
    beta_end: _Beta | None = None
    """Beta of the last step (default 0.02); not of the cosine."""
    min_snr_gamma: PositiveFloat | None = None
    """Weigh steps of `ddpm` by their signal-to-noise ratio, but at most this (min-SNR, arXiv:2303.09556; 5 there);
    left out: all alike."""
    drop_condition: float | None = Field(default=None, ge=0, lt=1)
    """Share of images whose class or caption is left out in training, so that drawing can be guided (default 0.1)."""
    error: ReconstructionError | None = None
    """Error of `reconstruction`: of absolute differences (`l1`, default) or of squared ones (`l2`)."""
    kl_weight: float | None = Field(default=None, ge=0)
    """Weight in `reconstruction` of the latents' divergence from normal noise, each summed over an image (default
    1e-6)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of your own objective, by name."""

    @model_validator(mode="after")
    def _fields_fit_the_name(self) -> ObjectiveConfig:
        own = is_own(self.name)
        if not own and self.name not in OBJECTIVES:
            meant = did_you_mean(self.name, OBJECTIVES)
            invalid("name", f"unknown objective; one of {', '.join(OBJECTIVES)}, or package.module:Name{meant}")
        if self.beta is not None and self.name not in PREFERENCES:
            invalid("beta", f"beta is for {', '.join(PREFERENCES)}, but name is {self.name!r}: remove one of them")
        if self.margin and self.name != "simpo":
            invalid("margin", f"margin is for simpo, but name is {self.name!r}: remove one of them")
        for key, names in _OF_ONE.items():
            if getattr(self, key) is not None and self.name not in names:
                invalid(key, f"{key} is for {' and '.join(names)}, but name is {self.name!r}: remove one of them")
        for key in ("logit_mean", "logit_std"):
            if getattr(self, key) is not None and self.times != "logit_normal":
                invalid(key, f"{key} is for times: logit_normal, but times is {self.times or 'uniform'}")
        for key in ("beta_start", "beta_end"):
            if getattr(self, key) is not None and self.betas == "squaredcos_cap_v2":
                invalid(key, f"{key} is for linear betas, but betas is {self.betas!r}: remove one of them")
        if (self.beta_start or FIRST_BETA) > (self.beta_end or LAST_BETA):
            key = "beta_start" if self.beta_start is not None else "beta_end"
            invalid(key, "the first step's beta is more than the last one's: expected noise that grows")
        if self.options and not own:
            invalid("options", f"options are for an objective of your own, but name is {self.name!r}")
        return self

    @property
    def reads_images(self) -> bool:
        """Tell whether it is a loss of images; one of your own says so itself (`reads_of`)."""
        return self.name in IMAGES

    @property
    def of_images(self) -> dict[str, Any]:
        """Return the settings of a loss of images that are given."""
        given = {key: getattr(self, key) for key in _OF_ONE}
        return {key: value for key, value in given.items() if value is not None}
