"""Loading of models for use: a run's, or those that others made."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax

from trainfw.adapters import attach_bank
from trainfw.checkpoint import Checkpoints, read_identity, taking_the_next
from trainfw.data import Tokenizer, load_tokenizer
from trainfw.errors import UserError
from trainfw.models import LanguageModel
from trainfw.objectives import ObjectiveConfig
from trainfw.optim import OptimizerConfig
from trainfw.paths import path_text
from trainfw.pieces import is_own
from trainfw.program import Program, build_program
from trainfw.recipe import Recipe, load_recipe
from trainfw.training.base import check_base
from trainfw.training.run_directory import RunDirectory
from trainfw.weights import (
    Base,
    LoadedFrom,
    Which,
    check_tokenizer,
    is_run,
    model_of,
    open_base,
    read_adapter,
    reads_average,
)

# Where and how a run was trained does not matter to whoever uses its model.
ANY_DEVICES = ("parallel={}", "hardware={}", "train.accumulation_steps=1")


def load_model(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    weights: Which | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """A model on one device, and its tokenizer: `model(token_ids_BS) -> logits_BSV`, f32.

    Args:
        path: a Hugging Face directory, a GGUF file, `package:NAME`, or a run; that of an adapter comes with its base.
        step: of a run, the checkpoint (default: the latest).
        dtype: of the parameters and of the computation; by default that of a run's training, else float32.
        adapters: adapters of this model by name, each a run or a directory in PEFT's form. `generate_batch` then takes
            one of them, or none, for each row.
        weights: of a run with `optimizer.ema`, `ema` (the average, by default) or `raw`; `raw` ones of adapters, too.

    Raises UserError for a path that holds no model, and for adapters that do not fit it.
    """
    path = path_text(path)
    averaged = reads_average(path, weights)
    base: Base | None = None
    if not is_run(path):
        base = open_base(path)
        tokenizer = load_tokenizer(path)
        check_tokenizer(path, base.config, tokenizer)
        model = model_of(base, base.config, dtype or "float32")
    else:
        run = RunDirectory.existing(path)
        settings = [f"train.compute_dtype={dtype}"] if dtype else []
        recipe = load_recipe(run.recipe_file, [*ANY_DEVICES, "train.global_batch_size=1", *settings])
        if adapters and recipe.adapter is not None:
            raise UserError(
                f"{path}: is a run of an adapter itself; give the model it adapts, {recipe.model.from_}, and it among "
                "the adapters"
            )
        program = build_program(without_own(recipe, "objective", "optimizer"), jax.devices()[:1])
        frozen = {} if recipe.adapter is None else frozen_of(run, program)
        params = restore_params(run, program, step, averaged=averaged)
        model, tokenizer = program.model(params, frozen), load_tokenizer(path)
    if adapters:
        base = base or open_base(path, step, weights)
        kind: Which | None = "raw" if weights == "raw" else None
        read = {name: read_adapter(os.fspath(at), model.config, weights=kind) for name, at in adapters.items()}
        for name, adapter in read.items():
            adapter.check_base(base, path)
            if (kept := adapter.config.base) in ("int8", "nf4"):
                warnings.warn(
                    f"adapter {name} was trained on a base in {kept}; here the base is in {model.compute_dtype}, and "
                    "it may write otherwise than its run does",
                    stacklevel=2,
                )
        attach_bank(model, {name: (adapter.config, adapter.arrays) for name, adapter in read.items()})
    model.origin = LoadedFrom(path, step)
    return model, tokenizer


def without_own(recipe: Recipe, *sections: str) -> Recipe:
    """Return a recipe of the same model, without pieces that only the script knows that trained it."""
    others = {"objective": ObjectiveConfig(), "optimizer": OptimizerConfig()}
    return recipe.model_copy(update={key: others[key] for key in sections if is_own(getattr(recipe, key).name)})


def frozen_of(run: RunDirectory, program: Program) -> Any:
    """Return what is frozen in a run. Raises UserError where it is no longer what it was trained on."""
    check_base(program.recipe, run, run.steps()[-1])
    return program.load_frozen()


def restore_params(run: RunDirectory, program: Program, step: int | None, *, averaged: bool) -> Any:
    checkpoints = Checkpoints(
        run.checkpoints,
        program.recipe.checkpoint,
        identity=read_identity(run.path),
        layer_order=program.layer_order,
        read_only=True,
    )

    def read() -> object:
        steps = run.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{run}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        chosen = steps[-1] if step is None else step
        return checkpoints.restore_params(chosen, program.abstract_state.params, averaged=averaged)

    return taking_the_next(read, step)
