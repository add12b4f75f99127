"""Export of models of images, and of their adapters, to directories of diffusers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from trainfw import interop
from trainfw.checkpoint import taking_the_next
from trainfw.errors import UserError
from trainfw.models import AutoencoderConfig, DiTConfig
from trainfw.objectives import FlowSchedule, Schedule, schedule_of
from trainfw.paths import resolve_path
from trainfw.recipe import Recipe
from trainfw.weights.open import Weights, Which, is_run, open_base, read_adapter, run_recipe

_SCHEDULER = "scheduler_config.json"
_LOADS_ADAPTERS = "SD3Transformer2DModel"
"""Class of those of our models that has a loader of adapters in diffusers."""


def is_of_images(source: str) -> bool:
    """Tell whether a path is that of a model of images: a run's, or a directory of diffusers."""
    if is_run(source):
        return run_recipe(source).reads_images
    directory = interop.part_of(resolve_path(source), None)
    return os.path.lexists(directory / "config.json") and interop.model_kind(directory) == "diffusers"


def export_images(source: str, out: str, *, dtype: str | None, step: int | None, weights: Which | None) -> str:
    """Write a run's model of images or adapter, or any such model, as diffusers has it; return a line about it."""
    recipe = run_recipe(source) if is_run(source) else None
    if recipe is not None and recipe.adapter is not None:
        if dtype not in (None, "float32"):
            raise UserError(f"dtype {dtype!r}: an adapter is written as it is, in float32")
        return _export_adapter(source, recipe, out, step, weights)
    schedule = None if recipe is None else schedule_of(recipe.objective)
    beside = resolve_path(source) / "scheduler" / _SCHEDULER
    if recipe is None and beside.is_file():
        schedule = interop.read_scheduler(beside)[0]
    return taking_the_next(lambda: write_images(open_base(source, step, weights), out, dtype, schedule), step)


def write_images(base: Weights, out: str, dtype: str | None, schedule: Schedule | None) -> str:
    """Write weights as the directory `transformer` or `vae` of a pipeline, with a scheduler where there is a schedule.

    Raises UserError, and writes nothing, where diffusers has no such model.
    """
    config, dtype = base.config, dtype or base.dtype
    read = reader_of(base)
    with interop.new_directory(out) as temporary:
        if isinstance(config, AutoencoderConfig):
            interop.save_autoencoder(temporary / "vae", config, read, dtype=dtype)
            parts = "vae"
        elif isinstance(config, DiTConfig):
            interop.save_transformer(temporary / "transformer", config, read, dtype=dtype)
            parts = "transformer"
            if config.autoencoder is not None:
                _write_autoencoder(temporary / "vae", config.autoencoder, dtype)
                parts += ", vae"
        else:
            raise UserError(f"a model of family {config.family!r} has no form in diffusers")
        if schedule is not None:
            _write_scheduler(temporary / "scheduler", schedule)
            parts += " and scheduler"
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    count = sum(math.prod(shape) for shape in interop.parameter_shapes(config).values())
    written = f"{out}: {parts} of diffusers, {count:,} parameters, {dtype}, {size / 1e6:.1f} MB"
    encoder = getattr(config, "text_encoder", None)
    return f"{written}\nnote: its captions are features of {encoder}, which is not in it" if encoder else written


def _write_autoencoder(directory: Path, path: str, dtype: str) -> None:
    base: Weights = open_base(path) if is_run(path) else interop.open_autoencoder(path)
    config, read = base.config, reader_of(base)
    assert isinstance(config, AutoencoderConfig), path  # else the run could not have read it
    interop.save_autoencoder(directory, config, read, dtype=dtype)


def reader_of(base: Weights) -> Callable[[str], np.ndarray]:
    """Return a function that reads whole parameters to the host in float32, from which any dtype is rounded once."""
    shapes = interop.parameter_shapes(base.config)
    return lambda name: np.asarray(base.read(name, jax.ShapeDtypeStruct(shapes[name], np.float32)))


def _write_scheduler(directory: Path, schedule: Schedule) -> None:
    sampler = "euler" if isinstance(schedule, FlowSchedule) else "dpm++"  # as pictures are drawn by default
    directory.mkdir()
    text = json.dumps(interop.scheduler_to_diffusers(schedule, sampler), indent=2, sort_keys=True)
    (directory / _SCHEDULER).write_text(f"{text}\n", "utf-8")


def _export_adapter(source: str, recipe: Recipe, out: str, step: int | None, weights: Which | None) -> str:
    model = recipe.model
    if not isinstance(model, DiTConfig):
        raise UserError(f"{source}: is an adapter of family {model.family!r}, which diffusers has none of")
    adapter = read_adapter(source, model, step, weights)
    interop.save_lora(out, adapter.config, adapter.arrays, model)
    count = sum(array.size for array in adapter.arrays.values())
    written = f"{out}: {adapter.config.kind} of diffusers, {count:,} parameters, float32, {4 * count / 1e6:.1f} MB"
    name = interop.transformer_to_diffusers(model)["_class_name"]
    if name != _LOADS_ADAPTERS:
        written += (
            f"\nnote: diffusers' {name} has no load_lora_adapter; a class derived from it and from "
            "diffusers.loaders.peft.PeftAdapterMixin has, and `trainfw merge` makes one model of both"
        )
    if adapter.config.base in ("int8", "nf4"):
        written += f"\nnote: it was trained on a base in {adapter.config.base}, which the file does not record"
    return written
