from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from trainfw.errors import UserError
from trainfw.objectives.config import ObjectiveConfig
from trainfw.objectives.next_token import NextToken
from trainfw.objectives.objective import Objective
from trainfw.objectives.preference import Preference, PreferenceLoss


@dataclass(frozen=True)
class TokenOptions:
    """What a recipe says of its tokens elsewhere, and losses of tokens read."""

    chunk: int
    """Tokens on a device whose logits exist at a time."""
    mask_documents: bool
    """A token attends to its own document only."""
    z_loss: float
    """Coefficient of log(Z)^2."""
    pairs_per_row: int


def make_objective(config: ObjectiveConfig, options: TokenOptions) -> Objective:
    """Return what a model learns. Raises UserError where somebody's own cannot be made."""
    if ":" in config.name:
        return _own(config)
    if config.name == "next_token":
        return NextToken(options.chunk, options.mask_documents, options.z_loss)
    kind = cast(PreferenceLoss, config.name)
    return Preference(kind, config.beta_or_default, config.margin, options.pairs_per_row, options.chunk)


def _own(config: ObjectiveConfig) -> Objective:
    """Return the objective `package.module:Name`, made of its options."""
    module, _, name = config.name.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(**config.options)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"name = {config.name!r}: cannot be made: {error}") from error
    lacking = [part for part in ("schema", "loss", "roles", "unit") if not hasattr(made, part)]
    if lacking:
        what = f"has no {' and no '.join(lacking)}; expected a trainfw.objectives.Objective"
        raise UserError(f"name = {config.name!r}: {what}")
    return made
