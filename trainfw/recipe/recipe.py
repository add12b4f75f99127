"""The typed recipe, composed of each package's own `Config`."""

from __future__ import annotations

import contextlib
import functools
import keyword
import operator
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from trainfw import yaml_text
from trainfw.adapters import AdapterConfig
from trainfw.backends import BackendConfig, load_sdk
from trainfw.checkpoint import CheckpointConfig
from trainfw.config import Config, invalid
from trainfw.data import DataConfig
from trainfw.errors import UserError
from trainfw.hardware import HardwareConfig
from trainfw.models import DEFAULT_FAMILY, FAMILIES, FamilyConfig, ModelSection, conditioning_of, family_of, load_family
from trainfw.objectives import IMAGES, OBJECTIVES, PREFERENCES, ObjectiveConfig
from trainfw.optim import NO_SCALES, OptimizerConfig, scales_updates
from trainfw.parallel import ParallelConfig
from trainfw.pieces import is_own
from trainfw.recipe.run_config import EvaluationConfig, FaultsConfig, TrainConfig, WatchdogConfig
from trainfw.recipe.sources import Sources, leaves, show, where
from trainfw.recipe.stage_config import StageConfig
from trainfw.recipe.stages import Stage, check_stages, stages_of


class Recipe(Config):
    """A whole training run. See `trainfw recipe schema` for every key."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    """Names the run, and its directory under runs/."""
    model: ModelSection
    adapter: AdapterConfig | None = None
    """Train an adapter of the model, whose own weights are frozen. Null trains all of them."""
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig | None = None
    """Evaluation of answers to held-out prompts, by a metric of the task; null: only the loss is computed."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Parts of the run, one after another, each with a mixture, rows, a batch or a learning rate of its own; none: one
    part, the whole. A checkpoint is saved where one ends."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    backend: BackendConfig = Field(default_factory=BackendConfig)

    _sources: Sources = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        try:
            load_sdk(self.hardware.sdk)
        except UserError as error:
            invalid("hardware.sdk", str(error).removeprefix("sdk = "))
        name, pairs = self.objective.name, self.data.format == "preferences"
        if name in PREFERENCES and not pairs:
            invalid("objective.name", f"{name} learns from pairs: set data.format: preferences, not {self.data.format}")
        if pairs and name == "next_token":
            invalid("objective.name", "next_token learns no pairs: set it to dpo, ipo, simpo or orpo")
        if self.model.update_scales is not None:
            if not scales_updates(self.optimizer.name):
                invalid("optimizer.name", f"{self.optimizer.name!r}: {NO_SCALES}")
            if self.adapter is not None:
                invalid(
                    "adapter", "muP has no rule for it here: `trainfw export` writes a model without muP, to be adapted"
                )
        self._reads_what_there_is()
        check_stages(self)
        evaluates = None if self.reads_images else self.evaluation
        for key, asked in (("train.sample_prompt", self.train.sample_prompt), ("evaluation", evaluates)):
            if asked is not None and not family_of(self.model).decodes:
                invalid(key, f"needs text of the model, and family {self.model.family!r} draws none: set it to null")
        return self

    def _reads_what_there_is(self) -> None:
        """Check that family, objective and data are all of pictures, or none is."""
        images, family = self.reads_images, self.model.family
        metric = None if self.evaluation is None else self.evaluation.metric
        if metric is not None and images != (metric in ("class_accuracy", "retrieval")):
            suits = "class_accuracy or retrieval" if images else "rouge_l, chrf or exact_match"
            invalid("evaluation.metric", f"{metric!r} does not suit model.family {family!r}: set it to {suits}")
        by_condition = {"class": "class_accuracy", "cross": "retrieval", "joint": "retrieval"}
        suited = by_condition.get(conditioning_of(self.model))
        if images and metric not in (None, suited):
            has = f"set it to {suited}" if suited else "set evaluation to null"
            invalid("evaluation.metric", f"{metric!r} does not suit model.conditioning: {has}")
        self._reads_no_more()
        if images != (self.data.format == "images"):
            form = "images" if images else "text, chat, prompt_completion or preferences"
            things = "pictures" if images else "text"
            invalid(
                "data.format", f"{self.data.format}, but model.family {family!r} learns from {things}: set it to {form}"
            )
        if not is_own(self.objective.name) and images != self.objective.reads_images:
            names = IMAGES if images else [name for name in OBJECTIVES if name not in IMAGES]
            invalid(
                "objective.name",
                f"{self.objective.name!r} does not suit model.family {family!r}: one of {', '.join(names)}",
            )

    def _reads_no_more(self) -> None:
        """Check that nothing is set of what is for models of the other kind alone."""
        of_text: dict[str, tuple[str, ...]] = {"train": ("z_loss", "loss_chunk", "sample_tokens")}
        of_text["evaluation"] = ("max_tokens", "batch_size")
        of_images: dict[str, tuple[str, ...]] = {"train": ("sample_images",)}
        for section, names in (of_text if self.reads_images else of_images).items():
            config = getattr(self, section)
            for name in names if config is not None else ():
                if getattr(config, name) != type(config).model_fields[name].default:
                    invalid(f"{section}.{name}", f"does nothing for model.family {self.model.family!r}: leave it out")

    def in_stages(self) -> list[Stage]:
        """Return the stages of the run in order; without any in the recipe, the whole run as one."""
        return stages_of(self)

    @property
    def group(self) -> int:
        """Count the rows of tokens in each of train.global_batch_size: two of a pair."""
        return 2 if self.data.format == "preferences" else 1

    @property
    def reads_images(self) -> bool:
        """Tell whether its model learns from pictures; otherwise it does from tokens."""
        return family_of(self.model).reads == "images"

    @property
    def sequence_length(self) -> int:
        """Count the places in a row: of tokens, or of the patches of a picture."""
        return self.model.num_patches or self.data.sequence_length

    @property
    def counted(self) -> tuple[str, int]:
        """Name what a run's progress is counted in, `token` or `image`, and how many are in a step."""
        return ("image", self.train.global_batch_size) if self.reads_images else ("token", self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Count the places for a token, or a patch, in a global batch."""
        return self.train.global_batch_size * self.group * self.sequence_length

    def __repr__(self) -> str:
        model, train = getattr(self.model, "preset", None) or self.model.from_ or self.model.family, self.train
        return f"<Recipe: {self.name}, {model}, {train.steps:,} steps of {self.tokens_per_step:,} tokens>"

    def __str__(self) -> str:
        return self.to_yaml()

    def __eq__(self, other: object) -> bool:
        # Where a key was written is not part of what it says.
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def written(self, key: str) -> str:
        """Say where `key` itself was written, `file:line` or `command line`; empty for a default."""
        return self._sources.get(key, "")

    def error(self, key: str, problem: str) -> UserError:
        """Make a UserError that says where `key` (dotted) was written, its value, and the problem."""
        attributes = (f"{part}_" if keyword.iskeyword(part) else part for part in key.split("."))
        value = operator.attrgetter(".".join(attributes))(self)
        return UserError(f"{where(key, self._sources, problem)}{key} = {show(value)}: {problem}")

    @contextlib.contextmanager
    def blamed(self, key: str) -> Iterator[None]:
        """Blame `key` for a UserError inside, and say where it was written.

        Of a section, about the field that the message begins with, or that the error names (`errors.about`).
        """
        try:
            yield
        except UserError as error:
            text = str(error)
            first = re.match(r"[a-z_0-9.]+(?= =|:| ')", text)
            named = f"{key}.{first[0].removeprefix(f'{key}.')}" if first else ""
            if error.placed:
                raise
            if first and named in keys(self.model.family) and "." not in error.field:
                key, text = named, text[first.end() :]
            else:
                key, text = f"{key}.{error.field}" if error.field else key, f": {text}"
            placed = UserError(f"{where(key, self._sources, text)}{key}{text}")
            placed.placed = True
            raise placed from error

    def to_yaml(self) -> str:
        """Write the resolved recipe, every key written out; it loads back to the same recipe."""
        return yaml_text.dump(self.model_dump())

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """List dotted key -> (value here, value in `other`), where they differ."""
        mine, theirs = (dict(leaves(_listed(recipe.model_dump()))) for recipe in (self, other))
        return {key: (mine.get(key), theirs.get(key)) for key in [*mine, *theirs] if mine.get(key) != theirs.get(key)}


def _listed(tree: dict[str, object]) -> dict[str, object]:
    """Return a recipe's keys with each stage by its number, and without what it leaves out."""
    listed = tree.get("stages")
    stages = {str(i): _given(stage) for i, stage in enumerate(listed if isinstance(listed, list) else ())}
    return {**tree, "stages": stages}


def _given(tree: object) -> object:
    return {key: _given(value) for key, value in tree.items() if value is not None} if isinstance(tree, dict) else tree


def expect_recipe(given: object) -> Recipe:
    """Check that Python code handed over a recipe. Raises UserError, with the call that makes one, where it is none."""
    if isinstance(given, Recipe):
        return given
    path = show(given) if isinstance(given, str | os.PathLike | Mapping) else "'quickstart'"
    raise UserError(f"recipe = {show(given)}: expected a trainfw.Recipe, such as trainfw.load_recipe({path}) returns")


def json_schema() -> dict[str, object]:
    """Make the JSON Schema of a recipe file. Nothing is required, since a file may extend another."""
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    _describe_families(schema)
    described = "Another recipe that this one refines: a file, relative to this one, or a bundled recipe."
    schema["properties"] = {"extends": {"type": "string", "description": described}, **schema["properties"]}
    return schema


def _describe_families(schema: dict[str, Any]) -> None:
    """Let the section `model` be that of any family, in a recipe's JSON Schema."""
    forms = [schema["properties"]["model"]]
    for name in FAMILIES:
        if name != DEFAULT_FAMILY:
            config = load_family(name).config
            form = config.model_json_schema(ref_template="#/$defs/{model}")
            schema["$defs"] |= form.pop("$defs", {})
            form.pop("required", None)
            form["properties"]["family"] = {"const": name}
            forms.append({**form, "required": ["family"]})
    forms.append({"type": "object", "properties": {"family": {"pattern": ":"}}, "required": ["family"]})
    schema["properties"]["model"] = {"anyOf": forms}


@functools.cache
def keys(family: str = DEFAULT_FAMILY) -> dict[str, Any]:
    """List every valid dotted key and its type; those of `model` by its family."""
    return dict(keys_of(Recipe, family))


def keys_of(config: type[BaseModel], family: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every valid dotted key of a section, and its type."""
    for attribute, field in config.model_fields.items():
        name = field.alias or attribute
        yield f"{prefix}{name}", field.annotation
        if get_origin(field.annotation) in (dict, list):
            continue
        for kind in (field.annotation, *get_args(field.annotation)):
            kind = load_family(family).config if kind is FamilyConfig else kind
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, family, f"{prefix}{name}.")
