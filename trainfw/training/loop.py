from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from trainfw import backends
from trainfw.checkpoint import Checkpoints
from trainfw.data import ExampleRows, PreparedData, TrainIterator, prepare, train_iterator
from trainfw.errors import RunError
from trainfw.hardware import peak_flops
from trainfw.models import Transformer, generate
from trainfw.program import Metrics, Program, TrainState, build_program, check_sources
from trainfw.recipe import Recipe, load_recipe
from trainfw.training.base import check_base
from trainfw.training.evaluation import Validation, validate
from trainfw.training.log import MetricsLog
from trainfw.training.reporter import Reporter
from trainfw.training.run_directory import Resume, RunDirectory
from trainfw.training.tasks import Comparison, TaskExample, evaluate_task, held_out_tasks, mean_score

_ROUTER = ("balance_loss", "router_z_loss", "dropped", "expert_load")
"""Metrics of a mixture of experts (`MoEStats.metrics`)."""

# Steps dispatched ahead of the one waited for: the device never idles, and the host never runs far ahead.
_IN_FLIGHT = 2


class Interrupted(Exception):
    """SIGINT or SIGTERM: the run saved what it had at `step`."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} at step {step}")
        self.signum, self.step = signum, step


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    run_dir: Path
    step: int
    validation: Validation | None
    sample: str | None
    evaluation: Comparison | None = None


def train(
    recipe: Recipe,
    *,
    devices: Sequence[jax.Device] | None = None,
    run_dir: str | Path | None = None,
    resume: Resume = "auto",
    reporter: Reporter | None = None,
    approve: Callable[[Program], None] | None = None,
) -> Result:
    """Run a recipe to its last step on `devices` (default: all); resume where its run directory left off.

    `run_dir` defaults to `runs/<name>`. `approve` sees the program before anything else is done, and may raise.
    Raises UserError for input that cannot work (before anything is written), RunError when the run fails, Interrupted
    when a signal stopped it after a checkpoint.
    """
    reporter = reporter or Reporter()
    run = RunDirectory(Path("runs") / recipe.name if run_dir is None else run_dir)
    resumed_step = run.check(recipe, resume)  # early, since what follows takes a while
    if recipe.evaluation is not None and recipe.data.format == "text":
        raise recipe.error("evaluation.metric", "needs prompts and references: data.format chat or prompt_completion")
    base = check_base(recipe, run, resumed_step)
    backend = backends.current()
    program = build_program(recipe, devices)
    count = program.mesh.size
    reporter.note(
        f"{recipe.name}: {_parameters(program)} on {count} {backend.platform} "
        f"device{'s' * (count > 1)} ({program.device_kind}){f', as {backend.name}' if backend.simulated else ''}, "
        f"layout {program.layout}"
    )
    if resumed_step is None:
        check_sources(recipe, program.abstract_state)
    if approve is not None:
        approve(program)
    data = _prepare_data(recipe, reporter)
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(_batches(program, data)))
        stack.enter_context(run.lock())
        resumed_step = run.check(recipe, resume)  # again, now that no other process can change the answer
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(run.checkpoints, recipe.checkpoint, layer_order=program.layer_order))
        )
        state = _first_state(program, checkpoints, batches, resumed_step, reporter)
        if resumed_step is not None:
            reporter.note(f"resumed {run} at step {resumed_step}{_changes(run, recipe)}")
        # Nothing of an earlier session is touched until all that could refuse to go on from it has not.
        run.open(recipe, resumed_step)
        data.tokenizer.save(run.tokenizer)
        log = stack.enter_context(contextlib.closing(MetricsLog(run, resumed_step)))
        monitor = backends.NeuronMonitor()
        if backend.platform == "neuron":
            stack.enter_context(monitor)
        session = _Run(program, data, batches, run, checkpoints, log, reporter, monitor, base)
        return session.to_the_end(state, resumed_step)


def _parameters(program: Program) -> str:
    if program.recipe.adapter is None:
        return f"{program.num_parameters:,} parameters"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state.frozen))
    return (
        f"{program.num_parameters:,} parameters of an adapter on {program.num_frozen:,} frozen ones "
        f"({size / program.num_frozen:.2f} bytes each)"
    )


def _prepare_data(recipe: Recipe, reporter: Reporter) -> PreparedData:
    with recipe.blamed("data"):
        data = prepare(recipe.data, progress=reporter.progress)
    if data.tokenizer.vocab_size > recipe.model.vocab_size:
        raise recipe.error(
            "model.vocab_size",
            f"is smaller than the tokenizer's vocabulary; expected {data.tokenizer.vocab_size} or more",
        )
    if data.train.learnt is None:
        size = f"{data.validation.num_bytes / data.validation.num_tokens:.2f} bytes per token"
    else:
        for note in data.notes():
            reporter.note(f"data: {note}")
        filled = ExampleRows(data.train, recipe.data.sequence_length).filled
        learnt = data.train.num_targets / data.train.num_tokens
        size = f"{learnt:.0%} of them learnt; rows of {recipe.data.sequence_length} are {filled:.1%} full"
    reporter.note(
        f"data: {data.train.num_tokens:,} tokens to train on, {data.validation.num_tokens:,} held out ({size})"
    )
    return data


def _changes(run: RunDirectory, recipe: Recipe) -> str:
    changed = load_recipe(run.recipe_file).differences(recipe)
    return "".join(f"; {key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())


def _batches(program: Program, data: PreparedData) -> TrainIterator:
    recipe, (share, shares) = program.recipe, program.batch_share
    with recipe.blamed("data"):
        return train_iterator(
            data.train,
            recipe.data,
            global_batch_size=recipe.train.global_batch_size,
            process_index=share,
            process_count=shares,
        )


def _first_state(
    program: Program,
    checkpoints: Checkpoints,
    batches: TrainIterator,
    resumed_step: int | None,
    reporter: Reporter,
) -> TrainState:
    """The checkpoint's state, with `batches` moved to its place, or the initial one."""
    if resumed_step is None:
        return program.init(progress=reporter.progress)
    abstract = program.abstract_state
    rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
    params, rest, meta = checkpoints.restore(resumed_step, abstract.params, rest)
    batches.set_state(meta["data"])
    return TrainState(params=params, frozen=program.load_frozen(progress=reporter.progress), **rest)


class _Run:
    """One session of a run, from its first step or a checkpoint to the last step."""

    def __init__(
        self,
        program: Program,
        data: PreparedData,
        batches: TrainIterator,
        run: RunDirectory,
        checkpoints: Checkpoints,
        log: MetricsLog,
        reporter: Reporter,
        monitor: backends.NeuronMonitor,
        base: dict[str, str] | None,
    ):
        self.program, self.data, self.batches, self.run = program, data, batches, run
        self.checkpoints, self.log, self.reporter, self.monitor = checkpoints, log, reporter, monitor
        self.recipe, self.base = program.recipe, base
        peak = peak_flops(program.device_kind, self.recipe.train.compute_dtype)
        self.peak_flops = None if peak is None else peak * program.mesh.size
        self.in_flight: deque[tuple[int, Metrics]] = deque()
        self.last_completed = 0.0
        self.times: list[float] = []

    def to_the_end(self, state: TrainState, resumed_step: int | None) -> Result:
        steps = self.recipe.train.steps
        step = resumed_step or 0
        validation: Validation | None = None
        if step < steps:
            if resumed_step is None:
                self._validate(state, step)
                self._evaluate(state, step)
            train_step = self._compile()
            state = self._steps(train_step, state, step)
        validation = self._validate(state, steps)
        if validation is not None:
            self._compare(validation)
        evaluation = self._compare_tasks(state, steps)
        sample = self._sample(state)
        self.reporter.note(f"done: step {steps}, saved in {self.run}")
        return Result(self.run.path, steps, validation, sample, evaluation)

    def _compile(self) -> Any:
        start = time.monotonic()
        self.reporter.note("compiling the training step")
        compiled = self.program.compile_train_step()
        self.reporter.note(f"compiled in {time.monotonic() - start:.1f} s; {self._mfu_definition()}")
        return compiled

    def _mfu_definition(self) -> str:
        if self.peak_flops is None:
            dtype = self.recipe.train.compute_dtype
            return f"no MFU: no published dense peak of {self.program.device_kind!r} at {dtype} is known here"
        return (
            f"MFU is model FLOPs ({self.program.flops_per_step:.3e} a step: forward and backward, causal attention, "
            f"no recomputation) over step time and the devices' dense {self.recipe.train.compute_dtype} peak "
            f"({self.peak_flops:.3e} FLOP/s)"
        )

    def _steps(self, train_step: Any, state: TrainState, step: int) -> TrainState:
        config, steps = self.recipe.train, self.recipe.train.steps
        self.last_completed = time.monotonic()
        with _signals() as signalled:
            while step < steps:
                batch = self.program.shard_batch(next(self.batches))
                with jax.transfer_guard("disallow"):  # nothing moves between host and device by accident
                    state, metrics = train_step(state, batch)
                step += 1
                self.in_flight.append((step, metrics))
                if len(self.in_flight) > _IN_FLIGHT:
                    self._complete_one()
                every = self.recipe.checkpoint.every
                stop = bool(signalled)  # read once: a signal may come at any moment
                save = stop or step == steps or (every and step % every == 0)
                check = config.validate_every and step % config.validate_every == 0 and step < steps
                if save or check:
                    self._drain()
                    # Before the save: a run that dies in between validates again, and no row is lost.
                    if check and not stop:
                        self._validate(state, step)
                    if save:
                        self._save(step, state)
                    self.last_completed = time.monotonic()  # neither is part of a step's time
                if stop and step < steps:
                    self.checkpoints.wait()
                    raise Interrupted(signalled[0], step)
            self.checkpoints.wait()  # while a signal still cannot cut it short
        return state

    def _drain(self) -> None:
        while self.in_flight:
            self._complete_one()

    def _complete_one(self) -> None:
        """Wait for the oldest step in flight. A step's time is from the completion of the one before."""
        step, metrics = self.in_flight.popleft()
        loss = metrics["loss"].value()  # waits
        now = time.monotonic()
        self.times.append(now - self.last_completed)
        self.last_completed = now
        for name, value in {"loss": loss, **{n: metrics[n].value() for n in ("grad_norm", "update_norm")}}.items():
            if not math.isfinite(value):
                self.checkpoints.wait()
                saved = self.run.steps()
                kept = f"step {saved[-1]} is the last one saved" if saved else "nothing was saved"
                raise RunError(
                    f"step {step}: {name} is {value}; {kept}; lower optimizer.learning_rate or look at the data"
                )
        self.reporter.step(step, self.recipe.train.steps)
        if step % self.recipe.train.log_every == 0 or step == self.recipe.train.steps:
            self._log_step(step, loss, metrics)

    def _log_step(self, step: int, loss: float, metrics: Metrics) -> None:
        seconds = sum(self.times) / len(self.times)
        self.times.clear()
        row = {
            "step": step,
            "loss": loss,
            "step_time_seconds": seconds,
            "tokens_per_second": self.program.tokens_per_step / seconds,
            "mfu": None if self.peak_flops is None else self.program.flops_per_step / seconds / self.peak_flops,
            "grad_norm": metrics["grad_norm"].value(),
            "learning_rate": metrics["learning_rate"].value(),
            **{name: metrics[name].value() for name in _ROUTER if name in metrics},
            "tokens": step * self.program.tokens_per_step,
            **self.monitor.latest(),
        }
        self.log.write(row)
        self.reporter.row(row, self.recipe.train.steps)

    def _save(self, step: int, state: TrainState) -> None:
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        meta = {"data": self.batches.get_state(), "recipe": self.recipe.model_dump(), "base": self.base}
        self.checkpoints.save(step, state.params, rest, meta)

    def _validate(self, state: TrainState, step: int) -> Validation | None:
        if self.recipe.train.validation_batches == 0:
            return None
        validation = validate(self.program, state.params, state.frozen, self.data, self.reporter)
        if not any(row["step"] == step and "validation_loss" in row for row in self.run.metrics()):
            self.log.write(validation.row(step))
        self.reporter.note(f"validation at step {step}: {validation}")
        return validation

    def _compare(self, validation: Validation) -> None:
        first = next(row for row in self.run.metrics() if "validation_bits_per_byte" in row)
        self.reporter.note(
            f"held-out documents, bits per byte: {first['validation_bits_per_byte']:.3f} at step {first['step']}, "
            f"{validation.bits_per_byte:.3f} now"
            + (f"; gzip -9 reaches {self.data.gzip_bits_per_byte:.3f}" if validation.complete else "")
        )

    def _evaluate(self, state: TrainState, step: int) -> list[dict[str, Any]]:
        """What `recipe.evaluation` asks for, from evaluation.jsonl where it was done before; nothing if it is null."""
        config = self.recipe.evaluation
        if config is None or jax.process_count() > 1:
            return []
        tasks = held_out_tasks(self.data.validation, config.examples)
        if len(done := self._evaluated(step, tasks)) == len(tasks):
            return done
        written = evaluate_task(self._model(state), self.data.tokenizer, tasks, config, self.reporter.progress)
        rows = [{"step": step, **row} for row in written]
        with self.run.evaluation_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        score = mean_score(rows, config.metric)
        self.log.write({"step": step, f"evaluation_{config.metric}": score, "evaluation_examples": len(rows)})
        self.reporter.note(f"evaluation at step {step}: {config.metric} {score:.3f} on {len(rows)} held-out examples")
        return rows

    def _evaluated(self, step: int, tasks: Sequence[TaskExample]) -> list[dict[str, Any]]:
        """What evaluation.jsonl has of these examples at `step`, done as the recipe says now."""
        config, decode = self.recipe.evaluation, self.data.tokenizer.decode
        assert config is not None
        found = {
            (row.get("example"), row.get("prompt")): row
            for row in self.run.evaluations()
            if row["step"] == step and row.get("max_tokens") == config.max_tokens and config.metric in row
        }
        keys = [(i, decode(task.prompt)) for i, task in enumerate(tasks)]
        return [found[key] for key in keys if key in found]

    def _compare_tasks(self, state: TrainState, steps: int) -> Comparison | None:
        config = self.recipe.evaluation
        if config is None or not (after := self._evaluate(state, steps)):
            return None
        before = self._evaluated(0, held_out_tasks(self.data.validation, config.examples))
        comparison = Comparison(config.metric, before if len(before) == len(after) else [], after)
        self.reporter.note(f"evaluation: {comparison}")
        for text in comparison.samples(config.samples):
            self.reporter.note(text)
        return comparison

    def _model(self, state: TrainState) -> Transformer:
        """The model on one device, to generate with."""
        device = backends.host_device() if backends.current().host_generate else jax.devices()[0]
        parts = (self.program.in_true_order(jax.device_put(part, device)) for part in (state.params, state.frozen))
        return self.program.model(*parts)

    def _sample(self, state: TrainState) -> str | None:
        prompt = self.recipe.train.sample_prompt
        if prompt is None or jax.process_count() > 1:
            return None
        tokenizer = self.data.tokenizer
        tokens = generate(
            self._model(state),
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            max_tokens=self.recipe.train.sample_tokens,
            eos_id=tokenizer.eos_id,
        )
        sample = tokenizer.decode(list(tokens))
        self.reporter.note(f"sample:\n{prompt}{sample}")
        return sample


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM; a second one acts as if nobody caught it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def receive(signum: int, _frame: object) -> None:
        received.append(signum)
        restore()

    for signum in previous:
        signal.signal(signum, receive)
    try:
        yield received
    finally:
        restore()
