from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trainfw import checkpoint
from trainfw.errors import RunError, UserError
from trainfw.paths import check_file
from trainfw.recipe import Recipe, load_recipe, refuse_recipe
from trainfw.training.records import EvaluationRow, FaultRow, MetricsRow, SessionRow, rewrite_rows, stream_rows
from trainfw.training.resuming import Change, changes
from trainfw.unfinished import write_text

Resume = Literal["auto", "never", "must"]

_TRIES = 3
_MOST_LEFT_OUT = 2**22
_URL = re.compile(r"([A-Za-z][\w+-]*:)/")


class RunDirectory:
    """The files of one run: run.json (its id and format), recipe.yaml, metrics.jsonl, sessions.jsonl, evaluation.jsonl
    and faults.jsonl where there are any, tensorboard/, tokenizer/, checkpoints/ (unless `config` has them
    elsewhere)."""

    def __init__(self, path: str | os.PathLike[str], config: checkpoint.CheckpointConfig | None = None):
        if not str(path):
            raise UserError("run directory: the path is empty")
        self.path = Path(os.path.expanduser(path))  # unlike Path's, leaves an unknown ~user as it is
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluation_file = self.path / "evaluation.jsonl"
        self.sessions_file = self.path / "sessions.jsonl"
        self.faults_file = self.path / "faults.jsonl"
        self.row_files = (self.metrics_file, self.evaluation_file, self.faults_file, self.sessions_file)
        self.tensorboard = self.path / "tensorboard"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = checkpoint.locate(self.path, config or checkpoint.CheckpointConfig())

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """A run that has something to load. Raises UserError where there is none."""
        refuse_recipe(path)
        run = cls(path)
        if not run.recipe_file.is_file():
            raise UserError(f"{path}: is not a run directory (it has no recipe.yaml)")
        checkpoint.read_identity(run.path)  # as in `check`
        run = cls(path, load_recipe(run.recipe_file).checkpoint)
        if not run.steps():
            raise UserError(f"{path}: holds no checkpoint yet")
        return run

    def steps(self) -> list[int]:
        return checkpoint.steps_in(self.checkpoints)

    def identity(self, report: Callable[[str], None] = lambda text: None) -> checkpoint.Identity:
        """The run's id: that in run.json or, where there is none, of its newest checkpoint, or a new one. Reads only.

        Raises UserError where a newer trainfw wrote the directory, or a checkpoint.
        """
        try:
            known = checkpoint.read_identity(self.path)
        except RunError as error:
            report(f"warning: {error}; taking the id of the run's newest checkpoint")
            known = None
        if known is not None:
            return known
        manifests = {}
        for step in reversed(self.steps()):
            with contextlib.suppress(checkpoint.Damage):
                manifests[str(step)] = checkpoint.read_manifest(self.checkpoints / str(step))
        named = next((manifest.run for manifest in manifests.values() if manifest.run is not None), None)
        older = {step: manifest.digest for step, manifest in manifests.items() if manifest.run is None}
        return checkpoint.Identity(older=older) if named is None else checkpoint.Identity(named, older)

    def check(self, recipe: Recipe, resume: Resume, accept: Sequence[str] = ()) -> int | None:
        """The step to resume from, or None to start. Reads only.

        `accept` names keys, or sections, of which other values are meant to change the run's numbers from here on.
        Raises UserError when the directory and the recipe do not go together.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self}: is a file; a run needs a directory of its own")
        check_place(self.path, recipe)
        self._refuse_links()
        with recipe.blamed("checkpoint.directory") if recipe.checkpoint.directory else contextlib.nullcontext():
            with contextlib.suppress(RunError):  # of a file that says nothing: `identity` makes it again
                # Before a newer trainfw's recipe, which may have keys that are unknown here.
                checkpoint.read_identity(self.path)
            checkpoint.check_name(self.checkpoints)
            steps = self.steps()
        for file in self.row_files:
            if os.path.lexists(file):
                check_file(file, named=True)
        # Where a run began there is checkpoints/ or, with these elsewhere, both of its files.
        begun = (self.path / "checkpoints").is_dir() or (self.metrics_file.is_file() and self.recipe_file.is_file())
        if self.path.is_dir() and not steps and not begun:
            others = {p.name for p in self.path.iterdir()} - {".lock", "logs", checkpoint.RUN_FILE}
            if others:
                raise UserError(f"{self}: holds {min(others)!r} but no run; choose another run_dir (--run-dir)")
        self._check_same_place(steps)
        if not steps:
            if resume == "must":
                raise UserError(f"{self}: holds no checkpoint to resume from (resume is 'must')")
            last = self.last_session()
            if resume == "auto" and last and last["step"] and (last["from"] or last.get("end") == "done"):
                raise UserError(
                    f"{self.checkpoints}: holds no checkpoint, and {self} had saved some, and reached step "
                    f"{last['step']}: mount or move them there again; resume='never' (--resume never) starts the run "
                    "anew, from step 0"
                )
            return None
        if resume == "never":
            raise UserError(
                f"{self}: already holds checkpoints up to step {steps[-1]}, which resume='never' (--resume never) will "
                f"not touch; {self.another(recipe)} starts another run"
            )
        if refused := [refusal for change in self.changes(recipe) if (refusal := change.refusal(accept))]:
            raise UserError(
                f"{self}: was trained with another recipe:\n" + "\n".join(f"  {line}" for line in refused) + "\n"
                f"set these keys back to resume it, or start another run with {self.another(recipe)}"
            )
        self.faults()
        identity = self.identity()
        believed = (s for s in reversed(steps) if checkpoint.find_mismatch(self.checkpoints / str(s), identity) is None)
        step = next(believed, steps[-1])
        asked, where = recipe.train.steps, recipe.written("train.steps")
        if step > asked:
            raise UserError(
                f"{f'{where}: ' if where in ('command line', 'overrides') else ''}train.steps = {asked}: {self} is at "
                f"step {step} already. train.steps={max(self.stored_recipe().train.steps, step + asked)} trains it on, "
                f"train.steps={step} leaves it as it is, and {self.another(recipe)} starts another run"
            )
        return step

    def _refuse_links(self) -> None:
        """Raise UserError where what a session writes would be written outside of the run: a copied run may hold links
        to files of another's. The run directory itself may be a link."""
        home = os.path.realpath(self.path)
        files = [self.path / checkpoint.RUN_FILE, self.recipe_file, *self.row_files, self.tensorboard, self.tokenizer]
        files += sorted(self.tokenizer.iterdir()) if self.tokenizer.is_dir() else []
        for file in files:
            if not Path(target := os.path.realpath(file)).is_relative_to(home):
                raise UserError(
                    f"{file}: leads to {target}, outside of the run directory, where a run would write; put the file "
                    "itself there, or remove the link"
                )

    def date(self) -> str:
        """The day that chat templates are told in this run: its own, or today where it has none yet."""
        known = load_recipe(self.recipe_file).data.date if self.recipe_file.is_file() else None
        return known or datetime.date.today().isoformat()

    def another(self, recipe: Recipe) -> str:
        """Return the argument that starts another run than this one."""
        free = (n for n in itertools.count(2) if not self.path.with_name(f"{self.path.name}-{n}").exists())
        named = self.path == Path("runs") / recipe.name
        return f"{f'name={recipe.name}' if named else f'--run-dir {self}'}-{next(free)}"

    def _check_same_place(self, steps: list[int]) -> None:
        """Raise UserError where the last session kept checkpoints elsewhere, which this one would not see."""
        if not self.recipe_file.is_file():
            return
        place = checkpoint.locate(self.path, load_recipe(self.recipe_file).checkpoint)
        if place == self.checkpoints:
            return
        there = checkpoint.steps_in(place)
        if there and there[-1] > max(steps, default=0):
            raise UserError(
                f"{self}: its checkpoints, up to step {there[-1]}, are in {place}, not in {self.checkpoints}: set "
                f"checkpoint.directory as it was, copy them, or choose another run_dir (--run-dir)"
            )

    def changes(self, recipe: Recipe) -> list[Change]:
        """List what `recipe` changes since the last session."""
        return changes(self.stored_recipe(), recipe)

    def saved_otherwise(self, step: int) -> list[Change]:
        """List keys that change losses and differ in a saved checkpoint though no session changed them."""
        try:
            saved = Recipe.model_validate(checkpoint.read_meta(self.checkpoints / str(step))["recipe"])
        except (checkpoint.Damage, ValidationError):  # of an older version, whose keys were others
            return []
        sessions = stream_rows(self.sessions_file, SessionRow)
        known = {key for row in sessions if isinstance(row.get("changed"), dict) for key in row["changed"]}
        found = changes(saved, self.stored_recipe())
        return [change for change in found if change.key not in known and change.refusal([])]

    def stored_recipe(self) -> Recipe:
        """Read the recipe of the last session, or of the last checkpoint where this directory has none."""
        if self.recipe_file.is_file():
            return load_recipe(self.recipe_file)
        try:
            return Recipe.model_validate(self.saved_meta()["recipe"])
        except ValidationError as error:
            raise UserError(f"{self.checkpoints}: the recipe in the last checkpoint is none: {error}") from None

    def saved_meta(self) -> dict[str, Any]:
        """Return what was saved beside the arrays of the newest checkpoint of this run in which it can be read.

        Raises RunError where there is none.
        """
        identity, problem = self.identity(), "there is none"
        for _ in range(_TRIES):  # a run that goes on may delete what was just listed
            for step in reversed(self.steps()):
                directory = self.checkpoints / str(step)
                found = checkpoint.find_mismatch(directory, identity)
                if found is None:
                    with contextlib.suppress(checkpoint.Damage):
                        return checkpoint.read_meta(directory)
                problem = f"step {step}: {found}"
        raise RunError(f"{self.checkpoints}: no checkpoint is whole ({problem})")

    def open(self, recipe: Recipe, resumed_step: int | None, identity: checkpoint.Identity) -> None:
        """Store id and recipe, and drop metrics newer than the step resumed from."""
        try:
            checkpoint.write_identity(self.path, identity)
            write_text(self.recipe_file, recipe.to_yaml())
            self.metrics_file.touch()
            self.drop_after(-1 if resumed_step is None else resumed_step)
        except OSError as error:
            raise UserError(f"{self}: cannot be written: {error.strerror}") from None

    def drop_after(self, step: int) -> None:
        for rows, file in ((self.metrics, self.metrics_file), (self.evaluations, self.evaluation_file)):
            if file.is_file():
                rewrite_rows(file, [row for row in rows() if row["step"] <= step])

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Give the rows of metrics.jsonl that can be used (`stream_rows`): a long run's are not held at once."""
        return stream_rows(self.metrics_file, MetricsRow)

    def evaluations(self) -> list[dict[str, Any]]:
        return list(stream_rows(self.evaluation_file, EvaluationRow))

    def last_session(self) -> dict[str, Any] | None:
        """The last row of sessions.jsonl; None where there is none."""
        return next(iter(deque(stream_rows(self.sessions_file, SessionRow), maxlen=1)), None)

    def seconds(self) -> float:
        """Add up the time of all sessions, without that between them."""
        last = {row["session"]: row for row in stream_rows(self.sessions_file, SessionRow)}
        return sum(value for row in last.values() for key, value in row.items() if key.endswith("_seconds"))

    def faults(self) -> list[dict[str, Any]]:
        """The rows of faults.jsonl. Raises UserError where one cannot be used: its batches would come back."""
        rows = list(stream_rows(self.faults_file, FaultRow, all_count=True))
        left_out = sum(row["rows"] for row in rows if row["policy"] == "rollback")
        if left_out > _MOST_LEFT_OUT:  # they are held in memory
            raise UserError(
                f"{self.faults_file}: its rollbacks leave out {left_out:,} rows of data; expected {_MOST_LEFT_OUT:,} "
                "at most: put it right, or delete the line that is wrong to go on without what it says"
            )
        return rows

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process trains here at a time, or keeps its checkpoints in the same place: those of others would be
        deleted by their number. The locks go with the process, however it ends."""
        from filelock import FileLock, Timeout

        places = [(self.path, "another process is training here; choose another run_dir (--run-dir)")]
        if not checkpoint.in_store(self.checkpoints):
            said = "another process that trains keeps its checkpoints here; choose another checkpoint.directory"
            places.append((self.checkpoints, said))
        with contextlib.ExitStack() as stack:
            for directory, said in places:
                try:
                    directory.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(directory / ".lock", timeout=0))
                except Timeout:
                    raise UserError(f"{directory}: {said}") from None
                except OSError as error:
                    raise UserError(f"{directory}: cannot be written: {error.strerror}") from None
            yield


def check_place(run_dir: str | os.PathLike[str], recipe: Recipe) -> None:
    """Raise UserError for a run directory, or a place for checkpoints, that cannot be one by its name."""
    if found := _URL.match(str(run_dir)):
        raise UserError(
            f"{run_dir}: {found[1]!r} names a store, and a run is a directory of this machine; checkpoints alone may "
            "be kept in a store: checkpoint.directory=s3://BUCKET/PLACE"
        )
    directory = recipe.checkpoint.directory
    if directory is None:
        checkpoint.check_name(Path(run_dir) / "checkpoints")
    elif "://" not in directory:  # of a store, the library that knows it may be with the job alone
        with recipe.blamed("checkpoint.directory"):
            checkpoint.check_name(Path(os.path.expanduser(directory)))
