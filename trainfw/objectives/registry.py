from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from trainfw.objectives.config import ObjectiveConfig
from trainfw.objectives.next_token import NextToken
from trainfw.objectives.objective import Objective
from trainfw.objectives.preference import Preference, PreferenceLoss
from trainfw.pieces import check_parts, is_own, make_piece

_PARTS = ("schema", "loss", "roles", "unit")
_EXPECTED = "trainfw.objectives.Objective"


@dataclass(frozen=True)
class TokenOptions:
    """Settings of a recipe's other sections that losses of tokens read."""

    chunk: int
    """Tokens on a device whose logits exist at a time."""
    mask_documents: bool
    """A token attends to its own document only."""
    z_loss: float
    """Coefficient of log(Z)^2."""
    pairs_per_row: int


def make_objective(config: ObjectiveConfig, options: TokenOptions) -> Objective:
    """Return what a model learns. Raises UserError where somebody's own cannot be made."""
    if is_own(config.name):
        made = make_piece(config.name, config.options, methods=("schema", "loss"), expected=_EXPECTED)
        return check_objective(made, config.name)
    if config.name == "next_token":
        return NextToken(options.chunk, options.mask_documents, options.z_loss)
    kind = cast(PreferenceLoss, config.name)
    return Preference(kind, config.beta_or_default, config.margin, options.pairs_per_row, options.chunk)


def check_objective(made: Any, name: str) -> Objective:
    """Return somebody's own objective. Raises UserError, which begins with `name`, where it is none."""
    objective: Objective = check_parts(made, "name", name, _PARTS, _EXPECTED)
    return objective
