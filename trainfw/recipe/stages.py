"""Stages of a run: parts of it with a mixture, rows, a batch or a learning rate of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainfw.config import invalid
from trainfw.errors import UserError, did_you_mean
from trainfw.optim import OptimizerConfig
from trainfw.recipe.stage_config import Anneal, StageConfig

if TYPE_CHECKING:
    from trainfw.data import Shares
    from trainfw.recipe.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """A part of a run, as a recipe of what one step of it does."""

    number: int
    """Number from 1."""
    first: int
    """Steps of the run before it."""
    end: int
    """Step that it ends with."""
    recipe: Recipe
    """The run's recipe with the stage's rows and batch."""
    weights: dict[str, tuple[float, float]]
    """Weight of each source that it reads, at its beginning and its end; of a recipe without a mixture, the one."""

    @property
    def steps(self) -> int:
        return self.end - self.first

    @property
    def mixed(self) -> str:
        """Say which share of the rows is each source's."""
        shares = self.shares
        said = [f"{start:.1%}" + (f" -> {end:.1%}" if end != start else "") for start, end in _floats(shares)]
        return ", ".join(f"{name} {share}" for name, share in zip(self.weights, said) if name)

    def __str__(self) -> str:
        sizes = f"rows of {self.recipe.sequence_length:,}, {self.recipe.train.global_batch_size:,} in a batch"
        return f"stage {self.number}, to step {self.end:,}: {self.mixed}{'; ' * bool(self.mixed)}{sizes}"

    @property
    def alone(self) -> Recipe:
        """Return the stage as a recipe of a run of its own, which can be planned and checked."""
        recipe = self.recipe
        rates = {first: own for first, _, own in rates_of(recipe)}
        changed: dict[str, Any] = {
            "stages": [],
            "train": recipe.train.model_copy(update={"steps": self.steps}),
            "optimizer": rates.get(self.first, recipe.optimizer),
        }
        return recipe.model_copy(update=changed)

    @property
    def rows(self) -> int:
        """Rows that its steps take."""
        return self.steps * self.recipe.train.global_batch_size

    @property
    def shares(self) -> Shares:
        """Return the shares of its sources, in the order of `weights`."""
        from trainfw.data import Shares

        start, end = zip(*self.weights.values())
        return Shares.of(start, end, self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes that a program is compiled for: rows, their length, microbatches."""
        train = self.recipe.train
        return train.global_batch_size, self.recipe.sequence_length, train.accumulation_steps


def stages_of(recipe: Recipe) -> list[Stage]:
    """Return the stages of a run in order; without any in the recipe, the whole run as one."""
    first, found = 0, []
    for number, (config, end) in enumerate(zip(recipe.stages, _ends(recipe)), start=1):
        found.append(Stage(number, first, end, _recipe_of(recipe, config), _weights(recipe, config)))
        first = end
    return found or [Stage(1, 0, recipe.train.steps, recipe, _weights(recipe, StageConfig()))]


def rates_of(recipe: Recipe) -> list[tuple[int, int, OptimizerConfig]]:
    """Return (first step, end, its optimizer) of the stages that have a learning rate of their own."""
    firsts = (0, *_ends(recipe))
    return [
        (first, end, _optimizer_of(recipe, config))
        for config, first, end in zip(recipe.stages, firsts, firsts[1:])
        if config.optimizer is not None
    ]


def stage_to_plan(recipe: Recipe, number: int | None = None) -> Recipe:
    """Return the recipe of one stage: by number, from 1, or that with the largest step where they differ in its shape.

    Raises UserError where there is no such stage.
    """
    stages = stages_of(recipe)
    if number is not None:
        if not recipe.stages or not 1 <= number <= len(stages):
            has = f"has {len(stages)}" if recipe.stages else "has no stages"
            raise UserError(f"stage = {number}: {recipe.name} {has}")
        return stages[number - 1].alone
    if len({stage.shape for stage in stages}) == 1:
        return recipe
    return max(stages, key=lambda stage: (stage.recipe.tokens_per_step, stage.recipe.sequence_length)).alone


def check_stages(recipe: Recipe) -> None:
    """Refuse stages that do not follow one another, or that name sources which are not there."""
    if recipe.data.stream is not None and any(stage.data is not None for stage in recipe.stages):
        invalid(
            "stages", "data.stream cuts rows of one sequence_length: leave it out of the stages, or set stream: null"
        )
    before, last = 0, len(recipe.stages) - 1
    for i, (config, end) in enumerate(zip(recipe.stages, _ends(recipe))):
        key = f"stages.{i}"
        if config.until is None and i < last:
            invalid(f"{key}.until", "is required of all stages but the last")
        said = f"{config.until!r}, step {end:,}" if isinstance(config.until, str) else f"{end:,}"
        if end <= before:
            past = f"the stage before ends at step {before:,}" if before else "no step is in it"
            invalid(f"{key}.until", f"{said}: {past}; expected a later step")
        if end > recipe.train.steps or (i == last and end < recipe.train.steps):
            most = "expected that" if i == last else "expected an earlier step"
            invalid(f"{key}.until", f"{said}: the run ends at train.steps = {recipe.train.steps:,}; {most}")
        steps, before = end - before, end
        _check_weights(recipe, config, key)
        if config.optimizer is None:
            continue
        try:
            own = _optimizer_of(recipe, config)
            for field, length in (("warmup_steps", own.warmup_steps), ("decay_steps", own.decay_steps or 0)):
                rest = steps - (own.warmup_steps if field == "decay_steps" else 1)
                if length > max(rest, 0):
                    problem = f"{length} is too long for a stage of {steps:,} steps; expected at most {max(rest, 0)}"
                    invalid(f"{key}.optimizer.{field}", problem)
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            field = found.get("ctx", {}).get("field") or ".".join(map(str, found["loc"]))
            invalid(f"{key}.optimizer.{field}", found["msg"])


def _check_weights(recipe: Recipe, config: StageConfig, key: str) -> None:
    if config.mixture is None:
        return
    if recipe.data.mixture is None:
        invalid(f"{key}.mixture", "weighs sources of data.mixture, which this recipe has not: name them there")
    for name in config.mixture:
        if name not in recipe.data.mixture:
            meant = did_you_mean(name, recipe.data.mixture)
            invalid(f"{key}.mixture.{name}", f"data.mixture has no such source{meant}")
    for at in (0, 1):
        if not any(_ends_of(weight)[at] for weight in config.mixture.values()):
            invalid(f"{key}.mixture", f"every weight is 0 at its {('beginning', 'end')[at]}: expected one above it")


def _floats(shares: Shares) -> list[tuple[float, float]]:
    return [(float(start), float(end)) for start, end in zip(shares.start, shares.end)]


def _ends(recipe: Recipe) -> list[int]:
    return [_step(stage.until, recipe.train.steps) for stage in recipe.stages]


def _step(until: int | str | None, steps: int) -> int:
    if until is None:
        return steps
    return until if isinstance(until, int) else round(float(until[:-1]) / 100 * steps)


def _weights(recipe: Recipe, config: StageConfig) -> dict[str, tuple[float, float]]:
    if recipe.data.mixture is None:
        return {"": (1.0, 1.0)}
    given: dict[str, Any] = dict(config.mixture or {name: one.weight for name, one in recipe.data.mixture.items()})
    ends = {name: _ends_of(given[name]) for name in recipe.data.mixture if name in given}
    return {name: pair for name, pair in ends.items() if any(pair)}


def _ends_of(weight: float | Anneal) -> tuple[float, float]:
    return (weight.from_, weight.to) if isinstance(weight, Anneal) else (weight, weight)


def _recipe_of(recipe: Recipe, config: StageConfig) -> Recipe:
    changed = {}
    for section in ("data", "train"):
        given = getattr(config, section)
        if given is not None:
            update = given.model_dump(exclude_none=True)
            changed[section] = getattr(recipe, section).model_copy(update=update)
    return recipe.model_copy(update=changed)


def _optimizer_of(recipe: Recipe, config: StageConfig) -> OptimizerConfig:
    """Return a stage's optimizer. Raises ValidationError where its keys do not go together."""
    assert config.optimizer is not None
    given = config.optimizer.model_dump(exclude_none=True)
    kept = recipe.optimizer.model_dump()
    if given.get("schedule", kept["schedule"]) != "wsd" or "decay_steps" in given:
        kept.pop("decay_steps")
    return OptimizerConfig(**kept | given)
