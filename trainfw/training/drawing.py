"""Drawing of pictures with a model of images: a run's, or one that is being trained."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainfw import sampling
from trainfw.adapters import attach_bank
from trainfw.data import PreparedImages, Progress, read_conditions
from trainfw.errors import UserError, did_you_mean, expect, pip_install, short
from trainfw.models import conditioning_of
from trainfw.objectives import FIRST, FlowSchedule, normal_rows, schedule_of
from trainfw.paths import path_text
from trainfw.program import Program, build_program, denoise_by_rows
from trainfw.recipe import Recipe, load_recipe
from trainfw.training.latents import LatentCodec
from trainfw.training.loading import ANY_DEVICES, frozen_of, restore_params
from trainfw.training.run_data import check_encoders, codec_of, encoder_of
from trainfw.training.run_directory import RunDirectory
from trainfw.training.text_encoder import HashedWords, TextEncoder
from trainfw.weights import Which, is_run, open_base, read_adapter, reads_average, run_recipe

_MOST_AT_ONCE = 64
"""Pictures drawn at once by default: more take memory, and hardly less time each."""
_SEEN = 32
"""Pixels of a side that can be seen."""


@dataclass(frozen=True)
class Drawer:
    """A model of images on the devices of its program, and what its pictures may be asked for."""

    program: Program
    denoise: Any
    """The program's function `denoise`, or that of a model with adapters, compiled."""
    params: Any
    frozen: Any
    run: Path
    classes: tuple[str, ...] = ()
    """Names of the classes that the model draws; empty where it has none."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """Identities of the encoders that the model was trained with."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters that pictures may be drawn with."""

    def draw(
        self,
        prompts: Sequence[str | None],
        *,
        steps: int = 20,
        guidance: float | None = None,
        seed: int = 0,
        sampler: str | None = None,
        adapters: Sequence[str | None] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Draw a picture for each prompt: u8[N, H, W, C].

        Args:
            prompts: a class's name, or a caption, as the model was trained; None for a model of neither.
            steps: evaluations of the model, but for `heun`, which takes two for each step but the last.
            guidance: 1 draws as the model is; more, further away from what it draws without a prompt. None: 4, or 1
                where a model has no prompts, or was never trained without them (`objective.drop_condition`).
            seed: of the noise; picture i starts from the same noise whatever the others are.
            sampler: one of `trainfw.sampling.SAMPLERS` that suits the objective; None: the objective's own.
            adapters: the adapter of each picture, of `self.adapters`; None for the model itself.

        Raises UserError for a prompt that the model has no class for, and for settings that make no sense.
        """
        given = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else []
        texts = bool(given) and all(prompt is None or isinstance(prompt, str) for prompt in given)
        expect("prompts", prompts, texts, "a list with a text for each picture, or None, such as ['7', '7']")
        guidance = self._guidance(guidance)
        expect("seed", seed, isinstance(seed, Integral) and 0 <= seed < 2**64, "a whole number from 0 to 2**64 - 1")
        expect(
            "sampler", sampler, sampler is None or isinstance(sampler, str), f"one of {', '.join(sampling.SAMPLERS)}"
        )
        schedule = getattr(self.program.objective, "schedule", None)
        if schedule is None:
            raise UserError("the run's objective has no schedule, by which pictures are drawn")
        sampler = sampler if sampler is not None else ("euler" if isinstance(schedule, FlowSchedule) else "dpm++")
        total = len(sampling.sampler_steps(schedule, sampler, steps)) * math.ceil(len(prompts) / self._rows)
        conditions = self._conditions(given, progress) | self._chosen(adapters, len(given))
        rows, shape = self._rows, self.program.schema.shape("image")[1:]
        pictures = np.zeros((len(prompts), *shape), np.float32)
        for start in range(0, len(prompts), rows):
            count = min(rows, len(prompts) - start)
            numbers = np.minimum(np.arange(start, start + rows), len(prompts) - 1)  # the last fills up the batch
            noise = jax.device_put(normal_rows(seed, numbers, shape, FIRST), self._places["image"].sharding)
            inputs = {name: array[numbers] for name, array in conditions.items()}

            def drawn(done: int, of: int, start: int = start) -> None:
                if progress is not None:
                    progress("drawing, evaluations of the model", start // rows * of + done, total)

            predict = self._predict(inputs, guidance)
            images = sampling.draw(predict, noise, schedule=schedule, sampler=sampler, steps=steps, progress=drawn)
            pictures[start : start + count] = np.asarray(images)[:count]
        if self._codec is not None:
            pictures = self._codec.decode(pictures)
        return np.clip(np.round((pictures + 1) * 127.5), 0, 255).astype(np.uint8)

    @property
    def _rows(self) -> int:
        """Count the pictures that are drawn at once."""
        return self.program.schema.sizes["batch"]

    @property
    def _places(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the inputs of `denoise` by name, abstract, with shardings."""
        places: dict[str, jax.ShapeDtypeStruct] = self.program.functions["denoise"].arguments[2]
        return places

    def _predict(self, inputs: dict[str, np.ndarray], guidance: float) -> Callable[[jax.Array, np.ndarray], jax.Array]:
        like = self._places
        placed = {name: jax.device_put(array, like.get(name, like["time"]).sharding) for name, array in inputs.items()}
        if "guidance" in like:
            placed["guidance"] = jax.device_put(np.float32(guidance), like["guidance"].sharding)

        def predict(image: jax.Array, time: np.ndarray) -> jax.Array:
            moved = {"image": image, "time": jax.device_put(time, like["time"].sharding)}
            prediction: jax.Array = self.denoise(self.params, self.frozen, placed | moved)
            return prediction

        return predict

    def _chosen(self, adapters: Sequence[str | None] | None, count: int) -> dict[str, np.ndarray]:
        """Return the number of each picture's adapter, where there are any; that of the model itself comes last."""
        names = [None] * count if adapters is None else list(adapters)
        expect("adapters", adapters, len(names) == count, f"a list of {count}, one for each prompt")
        for name in names:
            known = name is None or name in self.adapters
            expect("adapters", name, known, f"one of {', '.join(self.adapters) or 'none: the model has no adapters'}")
        places = [len(self.adapters) if name is None else self.adapters.index(name) for name in names]
        return {"adapter": np.array(places, np.int32)} if self.adapters else {}

    def _conditions(self, prompts: list[str | None], progress: Progress | None) -> dict[str, np.ndarray]:
        conditioning = conditioning_of(self.program.recipe.model)
        given = [prompt for prompt in prompts if prompt is not None]
        if conditioning == "none":
            if given:
                raise UserError(
                    f"prompt {short(given[0])}: the model was trained without classes or captions; leave it out"
                )
            return {}
        if len(given) < len(prompts):
            kinds = f"one of its classes, {', '.join(self.classes[:12])}" if self.classes else "a caption"
            raise UserError(f"prompt: the model draws {kinds}: give one (--prompt)")
        if conditioning == "class":
            for name in given:
                if name not in self.classes:
                    raise UserError(
                        f"prompt {short(name)}: is no class of the model; expected one of "
                        f"{', '.join(self.classes[:20])}{did_you_mean(name, self.classes)}"
                    )
            return {"label": np.array([self.classes.index(name) for name in given], np.int32)}
        before = self._encoder.cut
        features, mask = self._encoder(given, progress)
        if cut := self._encoder.cut - before:
            length = self.program.schema.sizes["caption"]
            longer = f"longer than the {length} tokens that the model reads (model.caption_length)"
            warnings.warn(f"{cut} prompt{'s' * (cut > 1)} {longer}: the rest counts for nothing", stacklevel=2)
        return {"caption": features, "caption_mask": mask}

    @cached_property
    def _codec(self) -> LatentCodec | None:
        codec = codec_of(self.program.recipe)
        if codec is not None:
            check_encoders(self.program.recipe, {"autoencoder": codec.identity}, self.encoders, self.run)
        return codec

    @cached_property
    def _encoder(self) -> TextEncoder | HashedWords:
        encoder = encoder_of(self.program.recipe)
        check_encoders(self.program.recipe, {"text_encoder": encoder.identity}, self.encoders, self.run)
        return encoder

    @property
    def usual_guidance(self) -> float:
        """Guidance where none is given: 4, or 1 where there is nothing to be guided by."""
        recipe = self.program.recipe
        return 4.0 if conditioning_of(recipe.model) != "none" and recipe.objective.drop_condition != 0 else 1.0

    def _guidance(self, guidance: float | None) -> float:
        """Return the guidance to draw with. Raises UserError where there is nothing to be guided by."""
        if guidance is None:
            return self.usual_guidance
        recipe = self.program.recipe
        conditioned, learnt = conditioning_of(recipe.model) != "none", recipe.objective.drop_condition != 0
        number = isinstance(guidance, Real) and math.isfinite(guidance) and abs(guidance) <= 1000
        expect("guidance", guidance, number, "a number up to 1000; 1 draws as the model is")
        why = "the model has no condition to be guided by"
        if conditioned:
            why = "the model was never trained without its condition (objective.drop_condition = 0)"
        expect("guidance", guidance, guidance == 1 or (conditioned and learnt), f"1: {why}")
        return float(guidance)


def load_drawer(
    path: str | os.PathLike[str],
    *,
    count: int = _MOST_AT_ONCE,
    step: int | None = None,
    weights: Which | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Drawer:
    """Open a run of a model of images on all devices (with adapters, on one), to draw up to `count` pictures at once.

    Args:
        weights: of a run with `optimizer.ema`, `ema` (the average, by default) or `raw`.
        adapters: adapters of this model by name, each a run or a directory in diffusers' form, of which each picture
            takes one, or none.

    Raises UserError where the run is of another kind, or holds no checkpoint, and for adapters that do not fit it.
    """
    run = RunDirectory.existing(path)
    whole = isinstance(count, Integral) and not isinstance(count, bool) and count > 0
    expect("count", count, whole, "a whole number, 1 or more")
    devices = 1 if adapters else jax.device_count()
    rows = math.ceil(min(count, _MOST_AT_ONCE) / devices) * devices
    recipe = load_recipe(run.recipe_file, [*ANY_DEVICES, f"train.global_batch_size={rows}"])
    program = build_program(recipe, jax.devices()[:devices])
    if "denoise" not in program.functions:
        raise UserError(
            f"{path}: is a run of {recipe.objective.name} and family {recipe.model.family!r}, which draws none"
        )
    averaged = reads_average(path_text(path), weights)
    params, frozen = restore_params(run, program, step, averaged=averaged), frozen_of(run, program)
    classes, encoders = read_conditions(run.path)
    if conditioning_of(recipe.model) == "class" and not classes:
        raise UserError(f"{run}: has lost its conditions.json, with the names of its classes; restore it")
    if not adapters:
        return Drawer(program, program.functions["denoise"].compile(), params, frozen, run.path, classes, encoders)
    if recipe.adapter is not None:
        raise UserError(f"{path}: is a run of an adapter itself; give the model it adapts, {recipe.model.from_}")
    model, base = program.model(params, frozen), open_base(path_text(path), step, weights)
    kind: Which | None = "raw" if weights == "raw" else None
    read = {name: read_adapter(path_text(at), recipe.model, weights=kind) for name, at in adapters.items()}
    learnt = _predicts(recipe)
    for name, adapter in read.items():
        adapter.check_base(base, path_text(path))
        own = run_recipe(adapter.path) if is_run(adapter.path) else recipe
        if _predicts(own) != learnt:
            problem = "predicts other things than the model, or by another schedule of noise"
            raise UserError(f"adapter {name}: was trained by {own.objective.name}, and {problem}")
    attach_bank(model, {name: (adapter.config, adapter.arrays) for name, adapter in read.items()})
    denoise, params, frozen = denoise_by_rows(program, model)
    return Drawer(program, denoise.compile(), params, frozen, run.path, classes, encoders, tuple(read))


def _predicts(recipe: Recipe) -> object:
    """Return what a model predicts, and of what noise; how often which times were seen is no part of it."""
    schedule = schedule_of(recipe.objective)
    return replace(schedule, shift=1.0) if isinstance(schedule, FlowSchedule) else schedule


def grid(pictures: np.ndarray, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Join pictures (N, H, W, C), each pixel enlarged to `scale` squared, row by row, with a line of white between."""
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        whole[top : top + height, left : left + width] = picture
    return whole


def scale_of(pictures: np.ndarray) -> int:
    """Return the number by which pictures (N, H, W, C) are enlarged to be looked at."""
    return max(1, _SEEN // pictures.shape[1])


def sample_prompts(recipe: Recipe, prepared: PreparedImages, count: int) -> list[str | None]:
    """Return prompts for a grid of samples: the classes in turn, or the first held-out captions."""
    match conditioning_of(recipe.model):
        case "none":
            return [None] * count
        case "class":
            return [prepared.classes[i % len(prepared.classes)] for i in range(count)]
    captions = [prepared.validation.caption(i) for i in range(min(count, len(prepared.validation)))]
    return [captions[i % len(captions)] for i in range(count)]


def encode_png(picture: np.ndarray) -> bytes:
    """Encode a picture, u8[H, W, 1 or 3], as a PNG file's bytes. Raises UserError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"pictures are written by Pillow: {pip_install('diffusion')}") from None
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file, "PNG")
    return file.getvalue()
