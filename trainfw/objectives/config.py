from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, model_validator

from trainfw.config import Config, invalid
from trainfw.errors import did_you_mean
from trainfw.pieces import is_own

PREFERENCES = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
"""Losses of pairs, each with its default beta: the papers' or TRL's."""
OBJECTIVES = ("next_token", *PREFERENCES)


class ObjectiveConfig(Config):
    """Objective: the loss, and its settings."""

    name: str = "next_token"
    """`next_token`: every token of the text, or those of examples that are to be learnt. Of pairs (`data.format:
    preferences`): `dpo` and `ipo`, which compare the model with the one it starts from (with an adapter, that is the
    model without it, at no memory more); `simpo` and `orpo`, which need no other model. Or your own,
    `package.module:Name`: see `trainfw.objectives.Objective`."""
    beta: PositiveFloat | None = None
    """Scale of a loss of pairs. `dpo`: how close to stay to the reference (default 0.1); `ipo`: likewise, 1 / (2 beta)
    is the margin that is aimed at (0.1); `simpo`: scale of the rewards (2.0); `orpo`: weight of the odds ratio (0.1).
    """
    margin: float = Field(default=0.0, ge=0)
    """Margin of `simpo`: by how much the reward of the chosen completion is to exceed the other's."""
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
        if self.options and not own:
            invalid("options", f"options are for an objective of your own, but name is {self.name!r}")
        return self

    @property
    def reads_pairs(self) -> bool:
        """Tell whether it is a loss of pairs."""
        return self.name in PREFERENCES

    @property
    def beta_or_default(self) -> float:
        return PREFERENCES[self.name] if self.beta is None else self.beta
