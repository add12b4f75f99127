from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from trainfw.config import INT32, Config, Dim, PositiveInt, invalid


class Anneal(Config):
    """A weight that changes linearly within a stage."""

    from_: float = Field(alias="from", ge=0)
    """The weight at the stage's beginning."""
    to: float = Field(ge=0)
    """The weight at its end."""


ANNEAL = "{from, to}"
"""Tag of an annealed weight, which errors leave out."""
Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("float")] | Annotated[Anneal, Tag(ANNEAL)],
    Discriminator(lambda given: ANNEAL if isinstance(given, dict | Anneal) else "float"),
]


class StageData(Config):
    """Keys of `data` that a stage may change."""

    sequence_length: Dim | None = None
    """Replacement of data.sequence_length."""


class StageTrain(Config):
    """Keys of `train` that a stage may change."""

    global_batch_size: Dim | None = None
    """Replacement of train.global_batch_size."""
    accumulation_steps: PositiveInt | None = None
    """Replacement of train.accumulation_steps."""


class StageOptimizer(Config):
    """Keys of `optimizer` that a stage may change: its learning rate is a schedule of its own then."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Replacement of optimizer.learning_rate."""
    adam_learning_rate: float | None = Field(default=None, gt=0)
    """Replacement of optimizer.adam_learning_rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] | None = None
    """Replacement of optimizer.schedule, over the stage's steps."""
    warmup_steps: int = Field(default=0, ge=0, le=INT32)
    """Replacement of optimizer.warmup_steps, from the stage's first step; none unless it is given."""
    decay_steps: PositiveInt | None = None
    """Replacement of optimizer.decay_steps."""
    final_fraction: float | None = Field(default=None, ge=0, le=1)
    """Replacement of optimizer.final_fraction."""


def in_sections(given: Mapping[str, object]) -> dict[str, object]:
    """Return a stage's keys with `data.sequence_length: 4096` as `data: {sequence_length: 4096}`."""
    tree = {key: value for key, value in given.items() if not (isinstance(key, str) and "." in key)}
    for key, value in given.items():
        if key not in tree:
            section, _, rest = key.partition(".")
            inside: object = {} if tree.get(section) is None else tree[section]
            if not isinstance(inside, dict):
                invalid(section, f"expected a section, beside {key}")
            if rest in inside:
                invalid(section, f"{key} is written twice")
            tree[section] = {**inside, rest: value}
    return tree


class StageConfig(Config):
    """A part of a run; what it leaves out is as in the rest of the recipe."""

    until: int | str | None = None
    """The step at which the stage ends, or a share of train.steps, such as `80%`. The last stage ends with the run."""
    mixture: dict[str, Weight] | None = None
    """Weights of sources of data.mixture, by name; a source that is not named gives no rows. `{from: 0, to: 3}` changes
    the source's share linearly from the stage's beginning to its end."""
    data: StageData | None = None
    """Other rows: `{sequence_length: 4096}`."""
    train: StageTrain | None = None
    """Another batch: `{global_batch_size: 16}`."""
    optimizer: StageOptimizer | None = None
    """A learning rate of the stage's own: a schedule over its steps, without warmup unless it has warmup_steps. Without
    one, the stage takes its part of the whole run's schedule."""

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, given: object) -> object:
        """Take `data.sequence_length: 4096` for `data: {sequence_length: 4096}`."""
        return in_sections(given) if isinstance(given, dict) else given

    @field_validator("until")
    @classmethod
    def _is_a_step(cls, until: object) -> object:
        if isinstance(until, str) and not re.fullmatch(r"(100(\.0+)?|\d{1,2}(\.\d+)?)%", until):
            invalid("", f"{until!r:.60}: expected a step, such as 8000, or a share of train.steps, such as '80%'")
        if isinstance(until, int) and until < 1:
            invalid("", f"{until}: expected a step from 1 on")
        return until
