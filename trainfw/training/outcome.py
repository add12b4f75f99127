from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from trainfw import backends
from trainfw.data import Prepared, PreparedData, PreparedImages, Progress, Tokenizer, stop_ids
from trainfw.models import LanguageModel
from trainfw.program import Program, TrainState
from trainfw.recipe import EvaluationConfig
from trainfw.serving import generate
from trainfw.training.evaluation import Validation, validate
from trainfw.training.loggers import MetricsLog
from trainfw.training.records import append_rows
from trainfw.training.reporter import Reporter
from trainfw.training.run_directory import RunDirectory
from trainfw.training.tasks import Comparison, TaskExample, evaluate_task, held_out_tasks, mean_score
from trainfw.unfinished import writing

if TYPE_CHECKING:  # imported where there are pictures
    from trainfw.training.drawing import Drawer
    from trainfw.training.image_tasks import ImageComparison, ImageScore


class Outcome:
    """Measures of what a run has learnt (validation, the task's metric, a sample), reported and logged."""

    def __init__(
        self,
        program: Program,
        eval_step: Callable[[], Any],
        data: Prepared,
        run: RunDirectory,
        log: MetricsLog,
        reporter: Reporter,
        progress: Progress,
    ):
        self.program, self.data, self.run, self.log, self.reporter = program, data, run, log, reporter
        self.recipe, self.progress, self.eval_step = program.recipe, progress, eval_step
        self.ema = self.recipe.optimizer.ema
        self.by = "" if self.ema is None else " by the average of the weights"
        self._denoise: Any = None
        train = self.recipe.train
        asked = self.recipe.evaluation or train.sample_prompt is not None or train.sample_images
        if jax.process_count() > 1 and asked:
            reporter.note("several processes: evaluation and samples are left out; `trainfw generate` reads the run")

    def validate(self, state: TrainState, step: int, stop: Callable[[], bool] = lambda: False) -> Validation | None:
        """None where the recipe wants none, or `stop` said so."""
        if self.recipe.train.validation_batches == 0:
            return None
        params = self.program.learnt(state)
        validation = validate(
            self.program, self.eval_step(), params, state.frozen, self.data, self.progress, stop, ema=self.ema
        )
        if validation is None:
            return None
        if all(row["step"] != step for row in self.log.validations()[-1:]):  # not by a session before this one
            self.log.write(validation.row(step))
        self.reporter.note(f"validation at step {step}: {validation}")
        return validation

    def draw_samples(self, state: TrainState, step: int) -> None:
        """Draw held-out conditions of a model of images as one picture: samples/step-N.png, and in TensorBoard."""
        count = self.recipe.train.sample_images
        if "denoise" not in self.program.functions or not count or jax.process_count() > 1:
            return
        from trainfw.training.drawing import grid, sample_prompts, scale_of

        if not self._picture_file("step", step).exists():  # by a session before this one
            pictures = self._drawer(state).draw(
                sample_prompts(self.recipe, self._pictures, count), progress=self.progress
            )
            self._write_picture("step", step, grid(pictures, scale=scale_of(pictures)), f"samples at step {step}")

    def _picture_file(self, kind: str, step: int) -> Path:
        return self.run.path / "samples" / f"{kind}-{step:06}.png"

    def _write_picture(self, kind: str, step: int, picture: np.ndarray, title: str) -> None:
        """Write samples/KIND-STEP.png, and the same into TensorBoard; a file that cannot be written is reported."""
        from trainfw.training.drawing import encode_png

        file, png = self._picture_file(kind, step), encode_png(picture)
        try:
            with writing(file) as partial:
                partial.write_bytes(png)
        except OSError as error:
            self.reporter.note(f"warning: {file} cannot be written: {error.strerror}")
            return
        self.log.picture(step, "samples" if kind == "step" else kind, png)
        self.reporter.note(f"{title}: {file}")

    @property
    def _pictures(self) -> PreparedImages:
        """The pictures; of a mixture, those of the first source."""
        first = next(iter(self.data.parts.values()))
        assert isinstance(first, PreparedImages)
        return first

    @property
    def _tokenizer(self) -> Tokenizer:
        first = next(iter(self.data.parts.values()))
        assert isinstance(first, PreparedData)
        return first.tokenizer

    def _tasks(self, count: int) -> list[TaskExample]:
        """Return held-out examples, as many of each source that has any."""
        stores = [part.validation for part in self.data.parts.values() if isinstance(part, PreparedData)]
        stores = [store for store in stores if store.learnt is not None]
        each = -(-count // len(stores))
        return [task for store in stores for task in held_out_tasks(store, each)][:count]

    def enter(self, program: Program, eval_step: Callable[[], Any]) -> None:
        """Measure by another stage's program."""
        if program is not self.program:
            self._denoise = None  # it is of the other's batch
        self.program, self.eval_step = program, eval_step

    def _drawer(self, state: TrainState) -> Drawer:
        from trainfw.training.drawing import Drawer

        if self._denoise is None:
            self._denoise = self.program.functions["denoise"].compile()
        params = self.program.learnt(state)
        return Drawer(self.program, self._denoise, params, state.frozen, self.run.path, self._pictures.classes)

    def compare(self, validation: Validation) -> None:
        first = next(iter(self.log.validations()), validation.row(0))
        then = f"at step {first['step']}"
        if validation.bits_per_byte is not None:
            before, now = first["validation_bits_per_byte"], validation.bits_per_byte
            gzip = validation.beside_gzip(self.data)
            self.reporter.note(f"bits per held-out byte: {before:.3f} {then}, {now:.3f} now{gzip}")
            return
        for name, value in validation.row(self.recipe.train.steps).items():
            if name in first and isinstance(value, float) and name != "validation_ema":
                title = name.removeprefix("validation_").replace("_", " ")
                self.reporter.note(f"held-out {title}: {first[name]:.3f} {then}, {value:.3f} now")

    def evaluate(self, state: TrainState, step: int) -> list[dict[str, Any]]:
        """Evaluate as `recipe.evaluation` asks, or read it from evaluation.jsonl where that was done before."""
        config = self.recipe.evaluation
        if config is None or jax.process_count() > 1:
            return []
        if isinstance(self.data, PreparedImages):
            drawn = self._evaluate_images(state, step, config)
            self.reporter.note(f"evaluation at step {step}: {drawn}")
            return []
        tasks = self._tasks(config.examples)
        if len(done := self._evaluated(step, tasks)) == len(tasks):
            return done
        written = evaluate_task(self._model(state), self._tokenizer, tasks, config, self.progress)
        rows = [{"step": step, **row} for row in written]
        try:
            append_rows(self.run.evaluation_file, rows)
        except OSError as error:
            self.reporter.note(f"warning: {self.run.evaluation_file} cannot be written: {error.strerror}")
        score = mean_score(rows, config.metric)
        average = {} if self.ema is None else {"evaluation_ema": self.ema}
        row = {"step": step, f"evaluation_{config.metric}": score, "evaluation_examples": len(rows), **average}
        self.log.write(row)
        said = f"{config.metric} {score:.3f} on {len(rows)} held-out examples{self.by}"
        self.reporter.note(f"evaluation at step {step}: {said}")
        return rows

    def _evaluated(self, step: int, tasks: Sequence[TaskExample]) -> list[dict[str, Any]]:
        """Read these examples' rows at `step` from evaluation.jsonl, where they were made as the recipe says now."""
        config, decode = self.recipe.evaluation, self._tokenizer.decode
        assert config is not None
        found = {
            (row.get("example"), row.get("prompt")): row
            for row in self.run.evaluations()
            if row["step"] == step and row.get("max_tokens") == config.max_tokens and config.metric in row
        }
        keys = [(i, decode(task.prompt)) for i, task in enumerate(tasks)]
        return [found[key] for key in keys if key in found]

    def _evaluate_images(self, state: TrainState, step: int, config: EvaluationConfig) -> ImageScore:
        from trainfw.training.image_tasks import evaluate_images

        assert isinstance(self.data, PreparedImages)
        drawer = self._drawer(state)
        score = evaluate_images(
            drawer,
            self.data,
            config.metric,
            config.examples,
            self.recipe.train.seed,
            samples=config.samples,
            progress=self.progress,
        )
        self.log.write({"step": step, f"evaluation_{score.metric}": score.value, "evaluation_examples": score.count})
        return score

    def compare_tasks(self, state: TrainState, steps: int) -> Comparison | ImageComparison | None:
        config = self.recipe.evaluation
        if config is not None and isinstance(self.data, PreparedImages) and jax.process_count() == 1:
            from trainfw.training.image_tasks import ImageComparison

            name = f"evaluation_{config.metric}"
            before = next((row[name] for row in self.log.rows() if row["step"] == 0 and name in row), None)
            compared = ImageComparison(before, self._evaluate_images(state, steps, config))
            self.reporter.note(f"evaluation: {compared}")
            for line in compared.after.samples:
                self.reporter.note(f"sample {line}")
            if compared.after.picture is not None:
                self._write_picture("nearest", steps, compared.after.picture, "drawn pictures, the nearest ones below")
            return compared
        if config is None or not (after := self.evaluate(state, steps)):
            return None
        before = self._evaluated(0, self._tasks(config.examples))
        comparison = Comparison(config.metric, before if len(before) == len(after) else [], after)
        self.reporter.note(f"evaluation: {comparison}")
        for text in comparison.samples(config.samples):
            self.reporter.note(text)
        return comparison

    def _model(self, state: TrainState) -> LanguageModel:
        """The model on one device, to generate with."""
        device = backends.host_device() if backends.current().host_generate else jax.devices()[0]
        params, frozen = (jax.device_put(part, device) for part in (self.program.learnt(state), state.frozen))
        return self.program.model(self.program.in_true_order(params), self.program.frozen_in_true_order(frozen))

    def sample(self, state: TrainState) -> str | None:
        prompt = self.recipe.train.sample_prompt
        if prompt is None or jax.process_count() > 1:
            return None
        tokenizer = self._tokenizer
        tokens = generate(
            self._model(state),
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            max_tokens=self.recipe.train.sample_tokens,
            eos_ids=stop_ids(tokenizer),
        )
        sample = tokenizer.decode(list(tokens))
        self.reporter.note(f"sample{self.by}:\n{prompt}{sample}")
        return sample
