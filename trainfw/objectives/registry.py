from __future__ import annotations

from typing import Any, cast

from trainfw.objectives.config import ObjectiveConfig
from trainfw.objectives.contract import check_parts_of
from trainfw.objectives.next_token import NextToken
from trainfw.objectives.objective import Objective
from trainfw.objectives.preference import Preference, PreferenceLoss
from trainfw.pieces import is_own, make_piece

_EXPECTED = "trainfw.objectives.Objective"


def make_objective(
    config: ObjectiveConfig, *, chunk: int, mask_documents: bool, z_loss: float, pairs_per_row: int
) -> Objective:
    """Return what a model learns; see `NextToken` and `Preference`. Raises UserError where one's own cannot be made."""
    if is_own(config.name):
        made = make_piece(config.name, config.options, methods=("schema", "loss"), expected=_EXPECTED)
        return check_objective(made, config.name)
    if config.name == "next_token":
        return NextToken(chunk, mask_documents, z_loss)
    return Preference(cast(PreferenceLoss, config.name), config.beta_or_default, config.margin, pairs_per_row, chunk)


def check_objective(made: Any, name: str) -> Objective:
    """Return somebody's own objective. Raises UserError, which begins with `name`, where it is none."""
    check_parts_of(made, name)
    objective: Objective = made
    return objective
