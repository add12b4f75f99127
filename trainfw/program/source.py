"""What `model.from` names, whatever form it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax

from trainfw.checkpoint import SavedParameters
from trainfw.errors import UserError
from trainfw.interop import open_model
from trainfw.models import ModelConfig
from trainfw.recipe import load_recipe


class Base(Protocol):
    """Weights to start from, by the names of our parameters."""

    config: ModelConfig

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        """One of them, laid out and of the dtype that `like` says. Raises UserError where its shape is another."""

    def fingerprint(self) -> str:
        """The weights' identity, wherever they lie."""


@dataclass(frozen=True)
class RunBase:
    """The latest checkpoint of a run that trained all weights."""

    config: ModelConfig
    saved: SavedParameters

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        return self.saved.read(name, like, layer_order)

    def fingerprint(self) -> str:
        return self.saved.fingerprint()


def is_run(path: str | Path) -> bool:
    """Whether a path is a run directory."""
    return (Path(path) / "recipe.yaml").is_file()


def open_base(path: str, step: int | None = None) -> Base:
    """Raises UserError for a path that holds no model, and for a run of an adapter, which has none of its own."""
    if not is_run(path):
        return open_model(path)
    recipe = load_recipe(path)
    if recipe.adapter is not None:
        raise UserError(
            f"{path}: is a run of an adapter on {recipe.model.from_ or 'a drawn model'}; "
            f"`trainfw merge {path} --out MODEL` makes a model of both"
        )
    return RunBase(recipe.model, SavedParameters(latest_checkpoint(path, step)))


def latest_checkpoint(run: str | Path, step: int | None = None) -> Path:
    """The directory of a run's checkpoint: of `step`, or the latest. Raises UserError where there is none."""
    directory = Path(run) / "checkpoints"
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())
    if not steps:
        raise UserError(f"{run}: holds no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{run}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return directory / str(steps[-1] if step is None else step)
