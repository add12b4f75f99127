from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from trainfw import backends
from trainfw.checkpoint import Checkpoints, Identity
from trainfw.data import EndlessBatches, Prepared, PreparedImages, PreparedMixture, Progress, read_conditions
from trainfw.errors import RunError, UserError
from trainfw.objectives import Objective
from trainfw.optim import OwnOptimizer
from trainfw.program import Program, TrainState, build_program, check_sources, name_pieces
from trainfw.recipe import Recipe, RecipeLike, load_recipe
from trainfw.training.agreement import agreeing, first_says, program_facts, recipe_facts
from trainfw.training.arguments import Given
from trainfw.training.base import check_base
from trainfw.training.callbacks import Callback, Callbacks
from trainfw.training.faults import FaultLog
from trainfw.training.inputs import check_inputs, check_memory
from trainfw.training.loggers import Logger, MetricsLog
from trainfw.training.outcome import Outcome
from trainfw.training.phases import Phases
from trainfw.training.reporter import Reporter
from trainfw.training.resuming import Changed, covers, cut_changes, cut_of
from trainfw.training.run_data import check_encoders, name_data, open_batches, read_data
from trainfw.training.run_directory import Resume, RunDirectory
from trainfw.training.run_stages import RunStages, check_stage, stage_programs
from trainfw.training.session import Interrupted, Result, Session
from trainfw.training.sessions import Sessions
from trainfw.weights import average_note

_FOR_EVER = 7 * 86400.0
"""Seconds that a process waits for the others to read data and compile, where no watchdog says how long."""


def train(
    recipe: RecipeLike,
    *,
    objective: Objective | None = None,
    optimizer: OwnOptimizer | None = None,
    data: Any = None,
    callbacks: Sequence[Callback] | None = (),
    loggers: Sequence[Logger] | None = (),
    devices: Sequence[jax.Device] | None = None,
    run_dir: str | Path | None = None,
    resume: Resume = "auto",
    accept: Sequence[str] = (),
    reporter: Reporter | None = None,
    approve: Callable[[Program], None] | None = None,
) -> Result:
    """Run a recipe to its last step on `devices` (default: all); resume where its run directory left off.

    A script may hand over pieces of its own. `objective`, `optimizer` (a function of the learning rate that returns an
    Optax transformation) and `data` (rows, an iterator of them or a function that makes one: text, dicts with
    `data.text_field`, or token ids) take the place of what the recipe says, and the run's recipe.yaml names them.
    `callbacks` hear of the run and may stop it; `loggers` get its rows beside metrics.jsonl and TensorBoard.

    `recipe` is what `load_recipe` takes, or returns. `run_dir` defaults to `runs/<name>`. `approve` sees the program
    before anything else is done, and may raise.
    `accept` names keys, such as `["optimizer.learning_rate"]`, or sections: other values of these than the run has had
    may change its losses from here on, where otherwise they are refused.
    Of several processes, each calls this; the first writes the run's files, which all must see.

    Raises UserError for input that cannot work (before anything is written), RunError when the run fails, Interrupted
    when a signal stopped it after a checkpoint. A process that hangs exits (`watchdog` in the recipe).
    """
    backends.refuse_lent()
    callbacks, loggers = () if callbacks is None else callbacks, () if loggers is None else loggers
    reporter = Reporter() if reporter is None else reporter
    given = Given(objective, optimizer, data, callbacks, loggers, devices, run_dir, resume, accept, reporter, approve)
    recipe = name_data(name_pieces(load_recipe(recipe), objective, optimizer), data)
    backends.compute_inline()
    with Phases(recipe.watchdog) as phases:
        return _train(_agree(recipe, given), given, phases)


@dataclasses.dataclass(frozen=True)
class _Agreed:
    """Run that all processes agree to begin, before anything of it is opened."""

    run: RunDirectory
    recipe: Recipe
    programs: list[Program]
    """One for each stage."""
    base: dict[str, str] | None
    resumed_step: int | None
    patience: float
    """Seconds that a process waits for the others."""


def _agree(recipe: Recipe, given: Given) -> _Agreed:
    """Check what can be checked before anything is opened; the recipe of the result's program has a date."""
    patience = max(recipe.watchdog.start_seconds, recipe.watchdog.compile_seconds) or _FOR_EVER
    with agreeing("recipe") as facts:
        check_inputs(recipe, own_data=given.data is not None)
        path = Path("runs") / recipe.name if given.run_dir is None else given.run_dir
        with recipe.blamed("checkpoint") if recipe.checkpoint.directory else contextlib.nullcontext():
            run = RunDirectory(path, recipe.checkpoint)
        command = {"run directory": str(run.path.absolute()), "--resume": given.resume}
        facts |= recipe_facts(recipe) | {"command": command}
    if recipe.data.formats - {"text", "images"} and recipe.data.date is None:  # the day that templates are told
        date = first_says("date", run.date)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": date})})
    # Early, since what follows takes a while.
    resumed_step = first_says("check", lambda: run.check(recipe, given.resume, given.accept))
    with agreeing("program", patience) as facts:
        base = check_base(recipe, run, resumed_step, given.objective)
        programs = _programs(recipe, given, resumed_step)
        facts |= program_facts(programs[0]) | {"base": {"weights of model.from": base and base["hash"]}}
    return _Agreed(run, recipe, programs, base, resumed_step, patience)


def _train(agreed: _Agreed, given: Given, phases: Phases) -> Result:
    def progress(description: str, completed: int, total: int | None) -> None:
        phases.moved()
        reporter.progress(description, completed, total)

    run, resumed_step, patience = agreed.run, agreed.resumed_step, agreed.patience
    program = agreed.programs[0]
    recipe, accept, reporter = agreed.recipe, given.accept, given.reporter
    first, backend = jax.process_index() == 0, backends.current()
    changed: Changed = {} if resumed_step is None else first_says("cut", lambda: _cut_changes(run, program, accept))
    with contextlib.ExitStack() as stack:
        stages = stack.enter_context(RunStages(recipe, agreed.programs, reporter, phases))
        stages.enter(resumed_step or 0)
        with agreeing("data", patience) as facts:
            data = read_data(recipe, given.data, reporter, progress)
            batches = open_batches(recipe, program, data, given.data, reporter.note, progress)
            stack.enter_context(contextlib.closing(batches))
            facts |= {"data": data.facts()}
        # Again, now that no other process can change the answer.
        resumed_step = first_says(
            "start", lambda: (stack.enter_context(run.lock()), run.check(recipe, given.resume, accept))[1]
        )
        if resumed_step is not None and isinstance(data, PreparedImages | PreparedMixture):
            check_encoders(recipe, data.encoders, read_conditions(run.path)[1], run.path)
        identity = Identity(**first_says("identity", lambda: dataclasses.asdict(run.identity(reporter.note))))
        checkpoints = Checkpoints(
            run.checkpoints,
            recipe.checkpoint,
            identity=identity,
            layer_order=program.layer_order,
            report=lambda text: reporter.note(f"warning: {text}"),
        )
        stack.enter_context(contextlib.closing(checkpoints))
        resumed_step = checkpoints.newest_whole(reporter.note)
        # An adapter's step takes less memory than compiling it; on a GPU the compiler times its kernels.
        stages.enter(resumed_step or 0)
        if recipe.adapter is not None or backend.times_kernels:
            stages.compiling.wait()
        first_state = functools.partial(_state_at, program, checkpoints, batches, data.held_out_digest, progress)
        with agreeing("state", patience) as facts:
            facts |= {"start": {"step to go on from": resumed_step}}
            state = first_state(resumed_step)
            if (resumed_step or 0) < recipe.train.steps:
                stages.train_step()
            if jax.process_count() > 1:  # or one with a warm cache would wait in a step for one that compiles
                stages.compiling.wait()
        if resumed_step is not None:
            changed = {**{one.key: (one.before, one.now) for one in run.changes(recipe)}, **changed}
        _say_start(run, resumed_step, changed, accept, reporter)
        # Nothing of an earlier session is touched until all that could refuse to go on from it has not.
        first_says("opened", lambda: _open(run, recipe, data, resumed_step, identity))
        faults = FaultLog(run, recipe.faults, resumed_step or 0, writes=first)
        batches.skip(faults.rows)
        log = MetricsLog(run, resumed_step, reporter, writes=first, loggers=given.loggers)
        stack.enter_context(contextlib.closing(log))
        spent = sum(phases.so_far().values())
        monitor = backends.NeuronMonitor()
        if backend.has_monitor:
            stack.enter_context(contextlib.closing(monitor.start()))
        session = Session(
            outcome=Outcome(program, stages.compiling.eval_step, data, run, log, reporter, progress),
            stages=stages,
            batches=batches,
            checkpoints=checkpoints,
            faults=faults,
            sessions=Sessions(run.sessions_file, resumed_step or 0, spent, changed=changed, writes=first),
            phases=phases,
            monitor=monitor,
            base=agreed.base,
            callbacks=Callbacks(given.callbacks),
            first_state=first_state,
        )
        return _to_the_end(session, state, resumed_step)


def _programs(recipe: Recipe, given: Given, resumed_step: int | None) -> list[Program]:
    backend = backends.current()
    if backend.on_host:
        backends.keep_freed_memory()
    build = functools.partial(
        build_program, devices=given.devices, objective=given.objective, optimizer=given.optimizer
    )
    programs = stage_programs(recipe, build)
    program = programs[0]
    for one in programs:
        check_memory(one)
    if resumed_step is None:
        check_sources(recipe, program.abstract_state)
        adapter = None if recipe.adapter is None else recipe.adapter.from_
        for key, path in (("model.from", recipe.model.from_), ("adapter.from", adapter)):
            if path is not None and (note := average_note(path)):
                given.reporter.note(f"{key}: of {path}, {note}; `trainfw export --weights raw` has the others")
    if recipe.adapter is not None and recipe.model.from_ is None and recipe.reads_images:
        given.reporter.note("warning: an adapter of a model that has learnt nothing learns nothing: give model.from")
    count, processes = program.mesh.size, jax.process_count()
    given.reporter.note(
        f"{recipe.name}: {_parameters(program)} on {count} {backend.platform} "
        f"device{'s' * (count > 1)} ({program.device_kind}){f' of {processes} processes' * (processes > 1)}"
        f"{f', as {backend.name}' if backend.simulated else ''}, layout {program.layout}"
    )
    if given.approve is not None:
        given.approve(program)
    return programs


def _open(run: RunDirectory, recipe: Recipe, data: Prepared, resumed_step: int | None, identity: Identity) -> None:
    run.open(recipe, resumed_step, identity)
    data.save(run.path)


def _to_the_end(session: Session, state: TrainState, resumed_step: int | None) -> Result:
    end = "failed"
    try:
        with backends.start_is_kept():
            result = session.to_the_end(state, resumed_step)
        end = "done" if result.stopped is None else "stopped by a callback"
    except Interrupted as stop:
        end = str(stop)
        raise
    except jax.errors.JaxRuntimeError:
        if jax.process_count() > 1:  # of which one may have died
            session.checkpoints.abandon()
        raise
    finally:
        session.sessions.write(session.phases.step, session.phases.so_far(), end)
    return result


def _parameters(program: Program) -> str:
    if program.recipe.adapter is None:
        beside = f" beside {program.num_frozen:,} frozen ones of the reference" if program.num_frozen else ""
        return f"{program.num_parameters:,} parameters{beside}"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state.frozen))
    return (
        f"{program.num_parameters:,} parameters of an adapter on {program.num_frozen:,} frozen ones "
        f"({size / program.num_frozen:.2f} bytes each)"
    )


def _cut_changes(run: RunDirectory, program: Program, accept: Sequence[str]) -> Changed:
    before, now = run.saved_meta().get("cut", {}), cut_of(program.recipe, program.layout)
    try:
        return cut_changes(program.recipe, before, now, accept)
    except UserError as error:
        raise UserError(f"{run}: {error}") from None


def _say_start(
    run: RunDirectory, resumed_step: int | None, changed: Changed, accept: Sequence[str], reporter: Reporter
) -> None:
    if resumed_step is not None:
        said = (
            f"; {key} was {before!r}, is {now!r}{' (accepted)' * covers(accept, key)}"
            for key, (before, now) in changed.items()
        )
        reporter.note(f"resumed {run} at step {resumed_step}{''.join(said)}")
        for other in run.saved_otherwise(resumed_step):
            reporter.note(
                f"warning: the checkpoint of step {resumed_step} was saved with {other.key} = {other.before!r:.60}, "
                f"and {run.recipe_file} has {other.now!r:.60}: it may come from another copy of the run"
            )
    elif (last := run.last_session()) and last["step"]:
        reporter.note(
            f"warning: {run.checkpoints} holds no checkpoint, and the run had reached step {last['step']}; it starts "
            "anew, from step 0"
        )
    for key in accept:
        if not any(covers([key], other) for other in changed):
            why = "the run starts" if resumed_step is None else "nothing of it differs from the run's"
            reporter.note(f"accept: {key}: nothing to accept, {why}")


def _same_held_out(saved: str, now: str) -> bool:
    """Tell whether the held-out data is the same; of a mixture, that of the sources which are there both times."""
    if ":" not in saved or ":" not in now:
        return saved == now
    before, after = (dict(part.split(":") for part in text.split(" ")) for text in (saved, now))
    return all(after.get(name, digest) == digest for name, digest in before.items())


def _state_at(
    program: Program,
    checkpoints: Checkpoints,
    batches: EndlessBatches,
    held_out: str,
    progress: Progress,
    step: int | None,
) -> TrainState:
    """A checkpoint's state, with `batches` moved to its place, or the initial one.

    Raises UserError where the data, or what is held out (`held_out` is its digest), is not what it was.
    """
    if step is None:
        batches.restart()
        return program.init(progress=progress)
    abstract = program.abstract_state
    rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
    params, rest, meta = checkpoints.restore(step, abstract.params, rest)
    if (saved := int(rest["step"])) != step:  # in format 1 the manifest does not say
        raise RunError(f"{checkpoints.directory}: the checkpoint of step {step} is step {saved}, not {step}")
    with program.recipe.blamed("data"):
        place = meta["data"]
        if (begun := place.get("stage", place.get("rows", {}).get("stage"))) is not None:
            check_stage(program.recipe, begun, step)
        batches.set_state(place)
        if not _same_held_out(meta.get("held_out", held_out), held_out):
            raise UserError(
                "the held-out documents are others than they were, so its validation losses would not compare; "
                "restore them, or start a new run"
            )
    guard = program.restore_guard(meta.get("guard") or {})
    return TrainState(params=params, frozen=program.load_frozen(progress=progress), guard=guard, **rest)
