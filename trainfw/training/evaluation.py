from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx

from trainfw.adapters import attach_bank
from trainfw.checkpoint import Checkpoints, read_identity, taking_the_next
from trainfw.data import PreparedData, Progress, Tokenizer, load_tokenizer, open_rows, prepare, validation_batches
from trainfw.errors import RunError, UserError
from trainfw.models import LanguageModel, abstract_model
from trainfw.objectives import Mean, Objective, ObjectiveConfig
from trainfw.optim import OptimizerConfig
from trainfw.paths import path_text
from trainfw.pieces import is_own
from trainfw.program import Program, build_program
from trainfw.recipe import Recipe, load_recipe, override_keys
from trainfw.training.base import check_base
from trainfw.training.inputs import check_inputs
from trainfw.training.reporter import Reporter
from trainfw.training.run_directory import RunDirectory
from trainfw.weights import Base, LoadedFrom, Which, check_tokenizer, is_run, open_base, read_adapter, reads_average


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

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def beside_gzip(self, data: PreparedData) -> str:
        """`; gzip -9 reaches 2.019`, where that is a comparison: of the same documents, and of enough of them."""
        gzip = data.gzip_bits_per_byte if self.complete else None
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
            **({} if self.ema is None else {"validation_ema": self.ema}),
        }

    def __str__(self) -> str:
        part = "" if self.complete else f" (of the first {self.count:,} held-out {self.unit}s)"
        part += "" if self.ema is None else f", by the average of the weights (ema {self.ema})"
        if self.bits_per_byte is None:
            shown = [f"loss {self.loss:.4f}"]
            for name, value in self.metrics.items():
                error = math.sqrt(value * (1 - value) / self.count) if name == "preference_accuracy" else None
                shown.append(f"{name.replace('_', ' ')} {value:.3f}{'' if error is None else f' ± {error:.3f}'}")
            return ", ".join(shown) + part
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e6 else f"{self.perplexity:.3g}"
        return f"loss {self.loss:.4f}, perplexity {perplexity}, {self.bits_per_byte:.3f} bits per byte{part}"


def validate(
    program: Program,
    eval_step: Any,
    params: Any,
    frozen: Any,
    data: PreparedData,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    *,
    ema: float | None = None,
) -> Validation | None:
    """Evaluate on the held-out split, or on its first `train.validation_batches` batches.

    `eval_step` is the program's, compiled. `stop` is asked before each batch whether to give up, and None returned.
    `ema` is the decay of the average that `params` are, where they are one.
    """
    recipe = program.recipe
    rows, limit = recipe.train.global_batch_size, recipe.train.validation_batches
    share = dict(zip(("process_index", "process_count"), program.batch_share))
    batches = validation_batches(data.validation, recipe.data, global_batch_size=rows, max_batches=limit, **share)
    everything = -(-len(open_rows(data.validation, recipe.data)) // rows)
    totals: dict[str, Mean] = {}
    for number, batch in enumerate(batches, start=1):
        if stop():
            return None
        metrics = eval_step(params, frozen, program.shard_batch(batch))
        # Summed on the host in float64: a float32 sum over millions of tokens would round.
        for name, mean in metrics.items():
            totals[name] = totals.get(name, Mean(0.0, 0.0)) + Mean(float(mean.total), float(mean.count))
        progress("validating, batches", number, everything if limit is None else min(everything, limit))
    unit, total = program.objective.unit, totals.pop("loss", Mean(0.0, 0.0))
    if not total.count:
        raise recipe.error("train.validation_batches", f"leaves no held-out {unit} to learn from")
    loss, count = total.value(), int(total.count)
    if not math.isfinite(loss):
        raise RunError(f"validation: the loss is {loss}: the parameters are no longer finite, or overflow in the model")
    of_text, held_out = unit == "token", data.validation
    bits = loss * held_out.num_targets / max(held_out.num_bytes, 1) / math.log(2)
    return Validation(
        loss=loss,
        unit=unit,
        count=count,
        metrics={name: mean.value() for name, mean in totals.items()},
        bits_per_byte=bits if of_text else None,
        complete=count == held_out.num_targets if of_text else limit is None or everything <= limit,
        ema=ema,
    )


# What an evaluation may be told; anything else would be silently ignored.
_EVALUATION_KEYS = ("data", "parallel", "hardware", "model.from", "train.global_batch_size", "train.validation_batches")

# Where and how a run was trained does not matter to whoever uses its model.
_ANY_DEVICES = ("parallel={}", "hardware={}", "train.accumulation_steps=1")


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
        graphdef, variables = nnx.split(abstract_model(base.config, compute_dtype=dtype or "float32"), nnx.Param)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        values = []
        for place, variable in nnx.to_flat_state(variables):
            abstract = jax.ShapeDtypeStruct(variable.shape, dtype or "float32", sharding=sharding)
            values.append((place, base.read(".".join(map(str, place)), abstract)))
        model = nnx.merge(graphdef, nnx.from_flat_state(values))
    else:
        run = RunDirectory.existing(path)
        settings = [f"train.compute_dtype={dtype}"] if dtype else []
        recipe = load_recipe(run.recipe_file, [*_ANY_DEVICES, "train.global_batch_size=1", *settings])
        if adapters and recipe.adapter is not None:
            raise UserError(
                f"{path}: is a run of an adapter itself; give the model it adapts, {recipe.model.from_}, and it among "
                "the adapters"
            )
        program = build_program(_without_own(recipe, "objective", "optimizer"), jax.devices()[:1])
        frozen = {} if recipe.adapter is None else _frozen(run, program)
        params = _restore(run, program, step, averaged=averaged)
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


def _without_own(recipe: Recipe, *sections: str) -> Recipe:
    """Return a recipe of the same model, without pieces that only the script knows that trained it."""
    others = {"objective": ObjectiveConfig(), "optimizer": OptimizerConfig()}
    return recipe.model_copy(update={key: others[key] for key in sections if is_own(getattr(recipe, key).name)})


def _frozen(run: RunDirectory, program: Program) -> Any:
    """Return what is frozen in a run. Raises UserError where it is no longer what it was trained on."""
    check_base(program.recipe, run, run.steps()[-1])
    return program.load_frozen()


def evaluate(
    path: str | os.PathLike[str],
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    objective: Objective | None = None,
    step: int | None = None,
    weights: Which | None = None,
    reporter: Reporter | None = None,
) -> tuple[Validation, PreparedData]:
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
    settings = [*_ANY_DEVICES, f"train.global_batch_size={-(-rows // devices) * devices}"]
    if any(key.startswith("data") for key in keys):
        settings.insert(0, f"data.tokenizer={{name: file, path: {json.dumps(str(run.tokenizer.absolute()))}}}")
    recipe = load_recipe(load_recipe(run.recipe_file, settings), overrides)
    check_inputs(recipe)
    program = build_program(_without_own(recipe, "optimizer"), objective=objective)
    with recipe.blamed("data"):
        data = prepare(recipe.data, progress=reporter.progress)
    for note in data.notes():
        reporter.note(note if note.startswith("warning: ") else f"data: {note}")
    if data.tokenizer.fingerprint() != load_tokenizer(run.tokenizer).fingerprint():
        raise recipe.error("data.tokenizer.name", f"makes other tokens than {run} was trained on")
    params, frozen = _restore(run, program, step, averaged=averaged), _frozen(run, program)
    decay = recipe.optimizer.ema if averaged else None
    validation = validate(program, program.compile_eval_step(), params, frozen, data, reporter.progress, ema=decay)
    assert validation is not None
    return validation, data


def _restore(run: RunDirectory, program: Program, step: int | None, *, averaged: bool) -> Any:
    checkpoints = Checkpoints(
        run.checkpoints,
        program.recipe.checkpoint,
        identity=read_identity(run.path),
        layer_order=program.layer_order,
        read_only=True,
    )

    def read() -> Any:
        steps = run.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{run}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        chosen = steps[-1] if step is None else step
        return checkpoints.restore_params(chosen, program.abstract_state.params, averaged=averaged)

    return taking_the_next(read, step)
