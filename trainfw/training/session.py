from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from trainfw import backends
from trainfw.checkpoint import Checkpoints
from trainfw.data import EndlessBatches
from trainfw.errors import RunError, UserError
from trainfw.hardware import peak_flops
from trainfw.objectives import Metrics
from trainfw.program import TrainState
from trainfw.training.callbacks import Callbacks
from trainfw.training.evaluation import Validation
from trainfw.training.faults import BadStep, FaultLog, Growth, compare_replicas, judge_step
from trainfw.training.first_step import FirstStep, check_first_step
from trainfw.training.outcome import Outcome
from trainfw.training.phases import Phases
from trainfw.training.resuming import cut_of
from trainfw.training.run_stages import RunStages
from trainfw.training.sessions import Sessions
from trainfw.training.stopping import Asked, Stop, stopping
from trainfw.training.tasks import Comparison

if TYPE_CHECKING:
    from trainfw.training.image_tasks import ImageComparison

_SAID = ("loss", "grad_norm", "learning_rate")
"""Metrics of every step, which have a place of their own in a row."""

# Steps dispatched ahead of the one waited for: the device never idles, and the host never runs far ahead.
_IN_FLIGHT = 2


class Interrupted(Exception):
    """A signal: the run is saved at `step`, or has nothing to save where that is 0."""

    def __init__(self, signum: int, step: int):
        what = "saved; the same command resumes" if step else "with nothing to save; the same command starts again"
        super().__init__(f"{signal.Signals(signum).name} at step {step}, {what}")
        self.signum, self.step = signum, step


@dataclass(frozen=True)
class Result:
    """Outcome of a finished run."""

    run_dir: Path
    step: int
    validation: Validation | None
    sample: str | None
    evaluation: Comparison | ImageComparison | None = None
    stopped: str | None = None
    """Callback that stopped the run before its last step, and its reason; None where the run is done."""


@dataclass(frozen=True)
class _InFlight:
    """A step that the devices may still be at."""

    step: int
    row: int
    """First row that the step reads, in the endless order of rows."""
    metrics: Metrics


class _RollBack(Exception):
    """A bad step, of which the policy is to go back."""


@dataclass
class Session:
    """One session of a run, from its first step or a checkpoint to the last step."""

    outcome: Outcome
    stages: RunStages
    batches: EndlessBatches
    checkpoints: Checkpoints
    faults: FaultLog
    sessions: Sessions
    phases: Phases
    monitor: backends.NeuronMonitor
    base: dict[str, str] | None
    callbacks: Callbacks
    first_state: Callable[[int | None], TrainState]
    """The state of a checkpoint (or, of None, of the beginning), with `batches` at its place."""

    def __post_init__(self) -> None:
        self.program, self.run, self.log = self.outcome.program, self.outcome.run, self.outcome.log
        self.train_step: Any = None
        self.recipe, self.reporter = self.stages.recipe, self.outcome.reporter
        peak = peak_flops(self.program.device_kind, self.recipe.train.compute_dtype)
        self.peak_flops = None if peak is None else peak * self.program.mesh.size
        self.in_flight: deque[_InFlight] = deque()
        # One CPU device is done with a step when it returns (`backends.compute_inline`).
        inline = self.program.mesh.size == 1 and backends.current().on_host
        # And without donation another step would take memory for a third state.
        self.most_in_flight = 0 if inline or not self.recipe.backend.donate else _IN_FLIGHT
        self.to_check = self.recipe.backend.donate and backends.current().checks_donation
        self.last_completed = 0.0
        self.times: list[float] = []
        self.saved: int | None = None
        self.validated: tuple[int, Validation] | None = None
        self.growth = Growth(next((row["loss"] for row in self.run.metrics() if row.get("loss") is not None), None))

    def to_the_end(self, state: TrainState, resumed_step: int | None) -> Result:
        """Train from `state` on, unless it is the last. Raises Interrupted, RunError."""
        steps, stopped = self.recipe.train.steps, None
        step = self.phases.step = resumed_step or 0
        self.saved = resumed_step
        self.sessions.write(step, self.phases.so_far())
        self._enter(step)
        if step < steps:
            dtype = self.recipe.train.compute_dtype
            self.reporter.note(
                f"no MFU: no published dense peak of {self.program.device_kind!r} at {dtype} is known here"
                if self.peak_flops is None
                else f"MFU is model FLOPs ({self.program.flops_per_step:.3e} a step: forward and backward, "
                f"{'causal ' * (not self.recipe.reads_images)}attention, no recomputation) over step time and the "
                f"devices' dense {dtype} peak ({self.peak_flops:.3e} FLOP/s)"
            )
            if resumed_step is None:
                with self.phases.during("validation"):
                    self._validate(state, step)
                    self.outcome.evaluate(state, step)
            with stopping(jax.process_count()) as stop, self.phases.during("step"):
                state, steps, stopped = self._steps(state, step, stop)
        with self.phases.during("validation"):
            validation = self._validate(state, steps)
            if validation is not None:
                self.outcome.compare(validation)
            evaluation = self.outcome.compare_tasks(state, steps)
            sample = self.outcome.sample(state)
        if step < steps:
            self.reporter.note(str(self.sessions.goodput(steps, self.phases.so_far())))
        self.callbacks.tell("end", steps, state)
        self._heed_loggers()  # of what was validated last
        self.callbacks.refuse([self.callbacks.failure()])
        how = f"stopped by {stopped}" if stopped else f"done: step {steps}"
        self.reporter.note(f"{how}, saved in {self.run}" if steps else f"{how}; no step is done, and nothing is saved")
        return Result(self.run.path, steps, validation, sample, evaluation, stopped)

    def _validate(self, state: TrainState, step: int, stop: Callable[[], bool] = lambda: False) -> Validation | None:
        """Validate, unless that was done at this step, and tell the callbacks."""
        if self.validated is not None and self.validated[0] == step:
            return self.validated[1]
        validation = self.outcome.validate(state, step, stop)
        if validation is not None or self.recipe.train.validation_batches == 0:
            self.outcome.draw_samples(state, step)
        if validation is not None:
            self.validated = step, validation
            self.callbacks.tell("validation", step, validation, state)
        return validation

    def _enter(self, step: int) -> None:
        """Go to the stage that comes after `step`."""
        self.stages.enter(step)
        self.batches.enter(self.stages.number)
        self.program = self.stages.program
        self.faults.batch_rows = self.program.recipe.train.global_batch_size
        self.outcome.enter(self.program, self.stages.compiling.eval_step)
        self.train_step = self.stages.train_step() if step < self.recipe.train.steps else None

    def _steps(self, state: TrainState, step: int, stop: Stop) -> tuple[TrainState, int, str | None]:
        """Return the last state, which is saved, its step, and the callback that stopped the run there, and why."""
        while True:
            try:
                return self._forward(state, step, stop)
            except _RollBack:
                del state  # room for another
                state, step = self._roll_back()
                self._enter(step)

    def _forward(self, state: TrainState, step: int, stop: Stop) -> tuple[TrainState, int, str | None]:
        config, steps = self.recipe.train, self.recipe.train.steps
        if jax.process_count() == 1:
            self.batches.give_up_when(lambda: stop.cause is not None)
        self.last_completed = time.monotonic()
        while step < steps:
            if self.callbacks.asked is not None:
                stop.request(self.callbacks.asked)
            if stop.turn():
                return state, step, self._leave(state, step, stop)
            if step == self.stages.current.end:
                self._enter(step)
                self.times.clear()  # of steps of another size
                self.last_completed = time.monotonic()  # to compile is no part of a step's time
            row = self.batches.next_row
            try:
                batch = self.program.shard_batch(next(self.batches))
            except Exception as error:
                if stop.cause is not None and jax.process_count() == 1:
                    continue  # it was waited for no longer
                # Of several processes others may have more, and no save is made by one alone.
                if not step or jax.process_count() > 1:
                    raise
                known = isinstance(error, RunError | UserError)
                self.callbacks.failed(str(error) if known else f"data: {type(error).__name__}: {error}", error)
                continue
            first = self._before_first(state, batch) if self.to_check else None
            with jax.transfer_guard("disallow"):  # nothing moves between host and device by accident
                state, metrics = self._step(state, batch)
            if first is not None:
                check_first_step(first, state, metrics, f"first step/{step}")
            step += 1
            self.in_flight.append(_InFlight(step, row, metrics))
            if len(self.in_flight) > self.most_in_flight:
                self._complete_one()
            every = self.recipe.checkpoint.every
            save = step == self.stages.current.end or (every and step % every == 0)
            check = config.validate_every and step % config.validate_every == 0 and step < steps
            compare = self.recipe.faults.replicas_every and step % self.recipe.faults.replicas_every == 0
            if save or check or compare:
                self._drain()
                if compare:  # what is saved has been seen to agree
                    compare_replicas(state.params, f"replicas/{step}")
                # Before the save: a run that dies in between validates again, and no row is lost.
                if check:
                    with self.phases.during("validation"):
                        self._validate(state, step, stop.turn)
                if save:
                    self._save(step, state)
                self.last_completed = time.monotonic()  # none of them is part of a step's time
        self._save_last(steps, state)  # while a signal still cannot cut it short
        self._all_saved(stop)
        return state, steps, None

    def _step(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the next state, in which `state` is used up, donated or not, and the metrics."""
        after, metrics = self.train_step(state, batch)
        if not self.recipe.backend.donate:
            for leaf in jax.tree.leaves(state):
                leaf.delete()  # others, up the stack, hold it too
        return after, metrics

    def _before_first(self, state: TrainState, batch: Any) -> FirstStep:
        self.to_check = False
        drops = self.recipe.adapter is not None and self.recipe.adapter.dropout > 0  # in training alone
        eval_step = None if drops else self.outcome.eval_step()
        loss = None if eval_step is None else eval_step(state.params, state.frozen, batch)["loss"].value()
        first = FirstStep(self.recipe, state, loss, self.program.traits)
        self.last_completed = time.monotonic()  # this is no part of the step's time
        return first

    def _leave(self, state: TrainState, step: int, stop: Stop) -> str:
        """Save, unless that was done; return why a callback stops the run. Raises Interrupted where a signal does."""
        self._drain()
        if step:
            self._save_last(step, state)
        self._all_saved(stop)
        if isinstance(stop.cause, Asked):
            return stop.cause.reason
        assert stop.cause is not None
        raise Interrupted(stop.cause, step)

    def _all_saved(self, stop: Stop) -> None:
        with self.phases.during("save"):
            self.callbacks.refuse(stop.meet("end", self.callbacks.failure()))

    def _drain(self) -> None:
        while self.in_flight:
            self._complete_one()

    def _complete_one(self) -> None:
        """Wait for the oldest step in flight. A step's time is from the completion of the one before."""
        done = self.in_flight.popleft()
        loss = done.metrics["loss"].value()  # waits
        now = time.monotonic()
        self.times.append(now - self.last_completed)
        self.last_completed = now
        self.phases.moved()
        bad = judge_step(done.step, done.row, done.metrics, self.recipe.faults)
        if bad is None:
            self.faults.good()
        else:
            self._bad(bad)
        if self.growth.seen(loss, last=done.step == self.recipe.train.steps):
            self.faults.grown(done.step, done.row, self.growth)
            self.reporter.note(
                f"warning: step {done.step}: the training loss has grown to {self.growth.now:.4g}, from "
                f"{self.growth.lowest:.4g} at its lowest; lower optimizer.learning_rate (here "
                f"{done.metrics['learning_rate'].value():.3g})"
            )
        self.phases.step = done.step
        self.reporter.step(done.step, self.recipe.train.steps)
        self.callbacks.tell("step", done.step, done.metrics)
        if done.step % self.recipe.train.log_every == 0 or done.step == self.recipe.train.steps:
            self._log_step(done.step, loss, done.metrics, done.row)

    def _bad(self, bad: BadStep) -> None:
        policy = self.faults.write(bad)
        if policy != "skip":
            with self.phases.during("save"):
                self.checkpoints.wait(must=False)
        last = self._last_saved()
        kept = f"step {last} is the last one saved" if last else "nothing was saved"
        if policy == "stop":
            rate = f"optimizer.learning_rate={self.recipe.optimizer.learning_rate / 10:.3g}"
            others = " or ".join(f"faults.{bad.kind}={other}" for other in ("skip", "rollback") if other != bad.policy)
            again, spoilt = "start again", ""
            if last:
                again, rate = "go on from there", f"{rate} --accept optimizer.learning_rate"
                spoilt = f"; if it comes again, start another run ({self.run.another(self.recipe)})"
            raise RunError(
                f"{bad}{self.faults.limit}; {kept}; look at the data, or {again} by the same command with a lower "
                f"learning rate ({rate}) or without such steps ({others}){spoilt}"
            )
        if policy == "rollback":
            self.reporter.note(f"warning: {bad}; going back to {f'step {last}' if last else 'the start'}")
            raise _RollBack
        self.reporter.note(f"warning: {bad}; skipped")

    def _roll_back(self) -> tuple[TrainState, int]:
        """The state of the last checkpoint, and its step; what came after it is forgotten."""
        self.saved = self._last_saved()
        done, first = self.phases.step, self.saved or 0
        self.phases.lost += self.phases.so_far()["step"] * (done - first) / max(done - self.sessions.first, 1)
        self.in_flight.clear()
        self.times.clear()
        self.validated = None
        self.growth.forget()
        with self.phases.during("start"):
            state = self.first_state(self.saved)
            self.batches.skip(self.faults.rows)
            self.faults.rewind(first)
            self.log.rewind(first)
        self.phases.step = first
        return state, first

    def _last_saved(self) -> int | None:
        steps = self.run.steps()
        return steps[-1] if steps else None

    def _log_step(self, step: int, loss: float, metrics: Metrics, row: int) -> None:
        """`row` is the first that the step read."""
        seconds = sum(self.times) / len(self.times)
        self.times.clear()
        so_far = self.phases.so_far()
        self.sessions.write(step, so_far)
        noun, count = self.program.recipe.counted
        logged = {
            "step": step,
            "loss": loss,
            "step_time_seconds": seconds,
            f"{noun}s_per_second": count / seconds,
            "mfu": None if self.peak_flops is None else self.program.flops_per_step / seconds / self.peak_flops,
            "grad_norm": metrics["grad_norm"].value(),
            "learning_rate": metrics["learning_rate"].value(),
            **{name: mean.value() for name, mean in metrics.items() if name not in _SAID},
            f"{noun}s": self._counted(step, row),
            "goodput": self.sessions.goodput(step, so_far).fraction,
            **self.faults.counts(),
            **self.monitor.latest(),
        }
        self.checkpoints.check()
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logged.items()}
        self.log.write(finite)  # JSON has no NaN
        self._heed_loggers()
        self.reporter.row(logged, self.recipe.train.steps)

    def _counted(self, step: int, row: int) -> int:
        """Count the tokens, or pictures, learnt from by the end of a step that began at `row`."""
        recipe = self.program.recipe
        if recipe.stages:
            return self.stages.count_before() + (step - self.stages.current.first) * recipe.counted[1]
        rows = row + recipe.train.global_batch_size - sum(left < row for left in self.faults.rows)
        return rows * recipe.counted[1] // recipe.train.global_batch_size

    def _heed_loggers(self) -> None:
        if self.log.failure is not None:
            self.callbacks.failed(str(self.log.failure), self.log.failure)

    def _save(self, step: int, state: TrainState) -> None:
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        meta = {
            "data": self.batches.get_state(),
            "held_out": self.outcome.data.held_out_digest,
            "recipe": self.recipe.model_dump(),
            "base": self.base,
            "cut": cut_of(self.recipe, self.program.layout),
            "guard": {name: jax.device_get(value).tolist() for name, value in state.guard.items()},
        }
        self.log.catch_up(durable=True)  # what a checkpoint has behind it is not lost with the machine's power
        with contextlib.suppress(OSError):
            self.faults.catch_up()
        with self.phases.during("save"):
            if self.checkpoints.save(step, state.params, rest, meta):
                self.saved = step  # or will be
                self.callbacks.tell("save", step, self.run.checkpoints / str(step))

    def _save_last(self, step: int, state: TrainState) -> None:
        """Have `step` on disk, unless it is. Tried twice: nothing comes after it. Raises RunError where it fails."""
        tries = 2 if jax.process_count() == 1 else 1  # of several, only one may know that it failed
        for left in reversed(range(tries)):
            try:
                if self.saved != step:
                    self._save(step, state)
                with self.phases.during("save"):
                    self.checkpoints.wait()
                if self.saved == step:
                    return
                raise RunError(f"{self.run}: step {step} is not saved")  # why was reported
            except RunError as error:
                if not left:
                    raise
                self.reporter.note(f"warning: {error}; trying once more")
                self.checkpoints.clear()
                self.saved = None
