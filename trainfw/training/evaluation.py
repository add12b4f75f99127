from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from trainfw.data import (
    Batch,
    DataConfig,
    Prepared,
    PreparedData,
    PreparedImages,
    Progress,
    TokenStore,
    load_tokenizer,
    prepare,
    read_conditions,
    row_set,
    validation_batches,
)
from trainfw.errors import RunError, UserError
from trainfw.objectives import Mean, Metrics, Objective
from trainfw.paths import path_text
from trainfw.program import Program, build_program
from trainfw.recipe import Recipe, load_recipe, override_keys
from trainfw.training.inputs import check_inputs
from trainfw.training.loading import ANY_DEVICES, frozen_of, restore_params, without_own
from trainfw.training.reporter import Reporter
from trainfw.training.run_data import check_encoders, prepare_images, prepare_mixture
from trainfw.training.run_directory import RunDirectory
from trainfw.weights import Which, reads_average


@dataclass(frozen=True)
class Validation:
    """The objective's loss, and what else it measures, over held-out data."""

    loss: float
    """Nats per token; of other objectives, their loss per unit."""
    unit: str
    """Name of what is counted, such as `token` or `pair`."""
    count: int
    metrics: Mapping[str, float]
    """Other measures of the objective, by name."""
    bits_per_byte: float | None
    """Bits per byte of the documents' UTF-8 text: comparable across tokenizers, and with a compressor. None where the
    loss is of something else than tokens."""
    complete: bool
    """All held-out data was counted. If not, bits_per_byte takes the whole split's bytes per token."""
    ema: float | None = None
    """Decay of the average of the weights that was validated (`optimizer.ema`); None: the weights themselves."""
    parts: Mapping[str, Validation] = field(default_factory=dict)
    """Each source of a mixture by itself. The whole is their average by the mixture's weights."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def beside_gzip(self, data: Prepared) -> str:
        """`; gzip -9 reaches 2.019`, where that is a comparison: of the same documents, and of enough of them."""
        gzip = data.gzip_bits_per_byte if self.complete and isinstance(data, PreparedData) else None
        return "" if gzip is None else f"; gzip -9 reaches {gzip:.3f}"

    def row(self, step: int) -> dict[str, Any]:
        of_text = {}
        if self.bits_per_byte is not None:
            of_text = {"validation_perplexity": self.perplexity, "validation_bits_per_byte": self.bits_per_byte}
        return {
            "step": step,
            "validation_loss": self.loss,
            **of_text,
            f"validation_{self.unit}s": self.count,
            **{f"validation_{name}": value for name, value in self.metrics.items()},
            **{f"validation_loss/{name}": part.loss for name, part in self.parts.items()},
            **({} if self.ema is None else {"validation_ema": self.ema}),
        }

    def __str__(self) -> str:
        part = "" if self.complete else f" (of the first {self.count:,} held-out {self.unit}s)"
        part += "" if self.ema is None else f", by the average of the weights (ema {self.ema})"
        if self.parts:
            part += "; loss by source: " + ", ".join(f"{name} {one.loss:.4f}" for name, one in self.parts.items())
        if self.bits_per_byte is None:
            shown = [f"loss {self.loss:.4f}"]
            for name, value in self.metrics.items():
                counted = name == "preference_accuracy" and not self.parts  # an average of sources has another error
                error = math.sqrt(value * (1 - value) / self.count) if counted else None
                shown.append(f"{name.replace('_', ' ')} {value:.3f}{'' if error is None else f' ± {error:.3f}'}")
            return ", ".join(shown) + part
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e6 else f"{self.perplexity:.3g}"
        return f"loss {self.loss:.4f}, perplexity {perplexity}, {self.bits_per_byte:.3f} bits per byte{part}"


def validate(
    program: Program,
    eval_step: Any,
    params: Any,
    frozen: Any,
    data: Prepared,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    *,
    ema: float | None = None,
) -> Validation | None:
    """Evaluate on the held-out split, or on its first `train.validation_batches` batches; of a mixture, by source.

    `eval_step` is the program's, compiled. `stop` is asked before each batch whether to give up, and None returned.
    `ema` is the decay of the average that `params` are, where they are one.
    """

    def evaluate_batch(batch: Batch) -> Metrics:
        return eval_step(params, frozen, program.shard_batch(batch, training=False))

    found: dict[str, Validation] = {}
    for name in data.parts:
        config = program.recipe.data.part(name)
        part = data.at(name, config.sequence_length)
        one = _validate_part(program, evaluate_batch, part, config, progress, stop)
        if one is None:
            return None
        found[name] = replace(one, ema=ema)
    if list(found) == [""]:
        return found[""]
    weights = {name: end for name, (_, end) in program.recipe.in_stages()[-1].weights.items() if end}
    return _average(found, weights)


def _average(parts: Mapping[str, Validation], weights: Mapping[str, float]) -> Validation:
    """Average the sources' figures by weight; those without any are shown by themselves alone."""
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    first = parts[next(iter(shares))]

    def mean(values: Mapping[str, float]) -> float:
        return sum(share * values[name] for name, share in shares.items())

    named = {name for part in parts.values() for name in part.metrics}
    bits = {name: part.bits_per_byte for name, part in parts.items() if part.bits_per_byte is not None}
    return replace(
        first,
        loss=mean({name: part.loss for name, part in parts.items()}),
        count=sum(part.count for part in parts.values()),
        metrics={one: mean({name: part.metrics[one] for name, part in parts.items()}) for one in named},
        bits_per_byte=mean(bits) if len(bits) == len(parts) else None,
        complete=all(part.complete for part in parts.values()),
        parts=parts,
    )


def _validate_part(
    program: Program,
    evaluate_batch: Callable[[Batch], Metrics],
    data: PreparedData | PreparedImages,
    config: DataConfig,
    progress: Progress,
    stop: Callable[[], bool],
) -> Validation | None:
    recipe = program.recipe
    rows, limit = recipe.train.global_batch_size, recipe.train.validation_batches
    share = dict(zip(("process_index", "process_count"), program.batch_share))
    held_out = data.validation
    batches = validation_batches(held_out, config, global_batch_size=rows, max_batches=limit, **share)
    everything = -(-len(row_set(held_out, config, held_out=True)) // rows)
    totals: dict[str, Mean] = {}
    for number, batch in enumerate(batches, start=1):
        if stop():
            return None
        # Summed on the host in float64: a float32 sum over millions of tokens would round.
        for name, mean in evaluate_batch(batch).items():
            totals[name] = totals.get(name, Mean(0.0, 0.0)) + Mean(float(mean.total), float(mean.count))
        progress("validating, batches", number, everything if limit is None else min(everything, limit))
    unit, total = program.objective.unit, totals.pop("loss", Mean(0.0, 0.0))
    if not total.count:
        raise recipe.error("train.validation_batches", f"leaves no held-out {unit} to learn from")
    loss, count = total.value(), int(total.count)
    if not math.isfinite(loss):
        raise RunError(f"validation: the loss is {loss}: the parameters are no longer finite, or overflow in the model")
    bits, complete = None, limit is None or everything <= limit
    if isinstance(held_out, TokenStore) and unit == "token":
        bits = loss * held_out.num_targets / max(held_out.num_bytes, 1) / math.log(2)
        complete = count == held_out.num_targets
    metrics = {name: mean.value() for name, mean in totals.items()}
    return Validation(loss=loss, unit=unit, count=count, metrics=metrics, bits_per_byte=bits, complete=complete)


def _as_in_the_end(recipe: Recipe) -> list[str]:
    """Return what makes a recipe validate as its last stage does."""
    last = recipe.in_stages()[-1]
    if not recipe.stages:
        return []
    weights = (
        []
        if recipe.data.mixture is None
        else [f"data.mixture.{name}.weight={last.weights.get(name, (0.0, 0.0))[1]}" for name in recipe.data.mixture]
    )
    return ["stages=[]", f"data.sequence_length={last.recipe.data.sequence_length}", *weights]


# What an evaluation may be told; anything else would be silently ignored.
_EVALUATION_KEYS = ("data", "parallel", "hardware", "model.from", "train.global_batch_size", "train.validation_batches")


def evaluate(
    path: str | os.PathLike[str],
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    objective: Objective | None = None,
    step: int | None = None,
    weights: Which | None = None,
    reporter: Reporter | None = None,
) -> tuple[Validation, Prepared]:
    """Validate a run's checkpoint on its held-out documents, or on those of another source with `data.` overrides.

    Overrides are what `load_recipe` takes. `objective` is the one that a script trained with, where Python does not
    find it by its name. `weights` of a run with `optimizer.ema` are `ema` (the average, by default) or `raw`. Other
    data is read with the run's own tokenizer. Runs on all devices, by FSDP unless `parallel.` overrides say otherwise.
    """
    reporter = reporter or Reporter()
    run = RunDirectory.existing(path)
    averaged = reads_average(path_text(path), weights)
    keys = override_keys(overrides)
    for key in keys:
        if not key.startswith(_EVALUATION_KEYS):
            raise UserError(f"{key}: does not change an evaluation; expected {', '.join(_EVALUATION_KEYS)}")
    # The batch changes no number here: as many rows as in training, rounded up to fit the devices.
    rows, devices = load_recipe(run.recipe_file).train.global_batch_size, jax.device_count()
    settings = [*ANY_DEVICES, f"train.global_batch_size={-(-rows // devices) * devices}"]
    images = load_recipe(run.recipe_file).reads_images
    if not images and any(key.startswith("data") for key in keys):
        settings.insert(0, f"data.tokenizer={{name: file, path: {json.dumps(str(run.tokenizer.absolute()))}}}")
    trained = load_recipe(run.recipe_file)
    settings += _as_in_the_end(trained)
    names = {name for stage in trained.in_stages() for name in stage.weights}
    recipe = load_recipe(load_recipe(run.recipe_file, settings), overrides)
    check_inputs(recipe)
    program = build_program(without_own(recipe, "optimizer"), objective=objective)
    data: Prepared
    if images:
        mixed = recipe.data.mixture is not None
        data = prepare_mixture(recipe, reporter.progress, names) if mixed else prepare_images(recipe, reporter.progress)
        classes, encoders = read_conditions(run.path)
        if data.classes != classes:
            raise recipe.error("data.source", f"has other classes than {run} was trained on")
        check_encoders(recipe, data.encoders, encoders, run.path)
    elif recipe.data.mixture is not None:
        data = prepare_mixture(recipe, reporter.progress, names)
    else:
        with recipe.blamed("data"):
            data = prepare(recipe.data, progress=reporter.progress)
    for note in data.notes():
        reporter.note(note if note.startswith("warning: ") else f"data: {note}")
    first = next(iter(data.parts.values()))
    if isinstance(first, PreparedData) and first.tokenizer.fingerprint() != load_tokenizer(run.tokenizer).fingerprint():
        raise recipe.error("data.tokenizer.name", f"makes other tokens than {run} was trained on")
    params, frozen = restore_params(run, program, step, averaged=averaged), frozen_of(run, program)
    decay = recipe.optimizer.ema if averaged else None
    validation = validate(program, program.compile_eval_step(), params, frozen, data, reporter.progress, ema=decay)
    assert validation is not None
    return validation, data
