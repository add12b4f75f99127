"""Lose what was not fsynced, and let writes fail: python benchmarks/lost_writes.py --cases 200 --seed 0

A tiny run is trained in two sessions, saving every third step, with a library preloaded (benchmarks/lost/journal.c,
compiled by `cc`) that writes down every change of its files. Then, of every eight cases,

- six are power losses at random moments: a tree as a disk may hold it then (benchmarks/lost/replay.py). It is opened
  as the commands do: a step that had been called saved, or a newer one, is restored bit for bit; every row of
  metrics.jsonl up to it is there, and the next one written is read again; the token cache gives the right tokens, or is
  made again. Where nothing had been called saved, a refusal in words is right too.
- one is such a tree from which `train` goes on to the end, with the losses of the run that was never stopped.
- one is a run whose writes fail at random for a while (no space, input/output errors, half a write): it ends, in words
  if not well, and started again has the losses of the run of which none failed.

Prints what went wrong, and exits 1 if anything did; 2 without a compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.lost.replay import Change, Disk, marks_before, read_journal
from benchmarks.lost.session import digests
from benchmarks.reporting import positive, say

STEPS = (12, 24)
"""Steps of the two sessions; the second makes the run longer."""
RECIPE: dict[str, Any] = {
    "name": "lost",
    "model": {"preset": "tiny", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
    "data": {"sequence_length": 16, "validation_fraction": 0.2, "tokenizer": {"name": "bytes"}},
    "train": {"steps": STEPS[0], "global_batch_size": 2, "log_every": 1, "validation_batches": 1},
    "optimizer": {"learning_rate": 3.0e-3, "warmup_steps": 2, "schedule": "constant"},
    "checkpoint": {"every": 3},
}
SECONDS = 240
"""Seconds that a process may take."""


@dataclass
class Lost:
    """A recorded run, and the cases that are made of it."""

    directory: Path
    rng: random.Random
    changes: list[Change] = field(default_factory=list)
    states: dict[int, list[str]] = field(default_factory=dict)
    rows: dict[int, Any] = field(default_factory=dict)
    """Losses by step."""
    first_session: int = 0
    """Changes that it made."""
    said: int = 0
    """The newest step that had been called saved when the power of this case went."""
    seen: Counter[str] = field(default_factory=Counter)

    def record(self) -> None:
        root, journal = self.directory / "root", self.directory / "journal"
        root.mkdir()
        self.write_recipe(self.directory / "recipe.yaml", root / "cache")
        for steps in STEPS:
            states = self.directory / f"states-{steps}.json"
            words = [self.directory / "recipe.yaml", root / "run", states, f"train.steps={steps}"]
            ran = self.run(["benchmarks.lost.session", *map(str, words)], LOST_JOURNAL=journal, LOST_ROOT=root)
            if ran.returncode:
                sys.exit(f"the run that is recorded failed:\n{ran.stdout}{ran.stderr}")
            self.states |= {int(step): state for step, state in json.loads(states.read_text()).items()}
            self.first_session = self.first_session or len(read_journal(journal))
        self.changes, self.rows = read_journal(journal), losses(root / "run")
        self._check_journal(root)
        saved, synced = len(self.states), sum(change.kind == "s" for change in self.changes)
        print(f"recorded {len(self.changes):,} changes with {synced:,} fsyncs, {saved} saves", flush=True)

    def _check_journal(self, root: Path) -> None:
        """All that was written down makes the tree that is there: nothing went past the library."""
        written = {name: content for name, content in Disk(str(root), self.changes).files() if content is not None}
        there = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        if differ := [name for name in written.keys() | there if written.get(name) != there.get(name)]:
            sys.exit(f"the journal misses changes of {', '.join(sorted(differ)[:5])}")

    def write_recipe(self, file: Path, cache: Path) -> Path:
        data = RECIPE["data"] | {"source": [str(self.directory / "text" / "*.txt")], "cache_dir": str(cache)}
        file.write_text(json.dumps(RECIPE | {"data": data}))
        return file

    def run(self, words: list[str], **environ: Any) -> subprocess.CompletedProcess[str]:
        """`python -m WORDS`; with a journal, or with writes that fail."""
        if environ:
            environ["LD_PRELOAD"] = self.directory / "journal.so"
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        variables |= {key: str(value) for key, value in environ.items()}
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.directory,
            env=variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    @cached_property
    def tokens(self) -> list[str]:
        return self._tokens(self.directory / "root" / "cache")

    def _recipe(self, cache: Path, *overrides: str) -> Any:
        from trainfw import load_recipe

        return load_recipe(self.directory / "recipe.yaml", [f"data.cache_dir={cache}", *overrides])

    def _tokens(self, cache: Path) -> list[str]:
        """Digests of the tokens themselves, not of what the cache says of them."""
        from trainfw.data import prepare

        data = prepare(self._recipe(cache).data)
        return digests(
            [part for store in (data.train, data.validation) for part in (store.tokens[:], store.offsets[:])]
        )

    # --- Cases -----------------------------------------------------------------------------------

    def power_loss(self, directory: Path) -> str:
        """Open a tree; "" where it is right, else what is not."""
        _, root = self._lose_power(directory)
        if self._tokens(root / "cache") != self.tokens:
            return "the token cache gives other tokens"
        return self._opened(root / "run", self._recipe(root / "cache", f"train.steps={STEPS[-1]}"), self.said)

    def _lose_power(self, directory: Path) -> tuple[int, Path]:
        moment = self.rng.randrange(1, len(self.changes) + 1)
        self.said = max((int(mark.partition("-")[2]) for mark in marks_before(self.changes, moment)), default=0)
        Disk(str(self.directory / "root"), self.changes[:moment], self.rng).write(directory / "tree")
        return moment, directory / "tree"

    def _opened(self, path: Path, recipe: Any, saved: int) -> str:
        from trainfw.training import RunDirectory

        if not path.exists():
            return "the run is gone" if saved else ""
        run = RunDirectory(path, recipe.checkpoint)
        run.check(recipe, "auto")
        step = self._restored(run, recipe)
        self.seen["starts anew" if not step else f"step called saved {'or newer' * (step > saved)}"] += 1
        if step < saved:
            return f"step {saved} was called saved, and the newest that is whole is {step}"
        run.open(recipe, step or None, identity=run.identity())
        return self._metrics_problem(run, step)

    def _restored(self, run: Any, recipe: Any) -> int:
        """The newest step that is whole, compared with what was saved; 0 for none."""
        from trainfw.checkpoint import Checkpoints

        state, (params, rest) = {}, self._abstract
        opened = Checkpoints(run.checkpoints, recipe.checkpoint, identity=run.identity())
        with contextlib.closing(opened) as checkpoints:
            step = checkpoints.newest_whole(lambda text: None)
            if step is None:
                return 0
            *state, _ = checkpoints.restore(step, params, rest)
        assert digests(*state) == self.states[step], f"step {step} is restored with other values"
        return step

    @cached_property
    def _abstract(self) -> tuple[Any, Any]:
        import jax

        from trainfw import build_program

        state = build_program(self._recipe(self.directory / "root" / "cache"), jax.devices()[:1]).abstract_state
        return state.params, {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}

    def _metrics_problem(self, run: Any, step: int) -> str:
        from trainfw.training import Reporter
        from trainfw.training.loggers import MetricsLog

        found = losses(run.path)
        if missing := [number for number in range(1, step + 1) if found.get(number) != self.rows[number]]:
            return f"metrics.jsonl lacks the rows of steps {missing} of {step} that are saved"
        log = MetricsLog(run, step, Reporter())
        log.write({"step": step + 1, "loss": self.rows.get(step + 1, 0.5)})
        log.close()
        return "" if len(losses(run.path)) == step + 1 else "a row that is appended to metrics.jsonl is not read again"

    def goes_on(self, directory: Path) -> str:
        """Train on from a tree; "" where all losses are as they were."""
        from trainfw.training import Reporter, train

        moment, root = self._lose_power(directory)
        steps = STEPS[moment > self.first_session]
        reporter = Reporter()
        reporter.note = lambda text: None  # type: ignore[method-assign]
        train(self._recipe(root / "cache", f"train.steps={steps}"), run_dir=root / "run", reporter=reporter)
        return self._losses_problem(root / "run", steps)

    def failing_writes(self, directory: Path) -> str:
        """Train while writes fail, and again."""
        recipe = self.write_recipe(directory / "recipe.yaml", directory / "cache")
        command = ["trainfw", "train", str(recipe), "--devices", "1", "--run-dir", str(directory / "run")]
        start = self.rng.randrange(self.first_session)
        length, often = self.rng.choice([(20, 500), (200, 100), (2000, 20), (100, 1000)])
        fail = f"{self.rng.randrange(1000)} {start} {start + length} {often}"
        try:
            ran = self.run(command, LOST_JOURNAL="/dev/null", LOST_ROOT=directory, LOST_FAIL=fail)
        except subprocess.TimeoutExpired as error:
            return f"LOST_FAIL={fail!r}: it has not ended after {SECONDS} s\n{(error.stdout or b'').decode()[-3000:]}"
        said = ran.stdout + ran.stderr
        self.seen[f"with writes that fail, exit {ran.returncode}"] += 1
        if ran.returncode not in (0, 1, 2) or "Traceback" in said:
            return f"LOST_FAIL={fail!r}: exit {ran.returncode}\n{said[-3000:]}"
        warned = "metrics cannot be written" in said
        ran = self.run(command)
        if ran.returncode:
            return f"LOST_FAIL={fail!r}: then it does not go on:\n{ran.stdout + ran.stderr[-3000:]}"
        return self._losses_problem(directory / "run", STEPS[0], all_there=not warned)

    def _losses_problem(self, run: Path, steps: int, all_there: bool = True) -> str:
        found = losses(run)
        wanted = {step: loss for step, loss in self.rows.items() if step <= steps and (all_there or step in found)}
        differ = [step for step in wanted.keys() | found if found.get(step) != wanted.get(step)]
        return f"other losses, or none, at steps {sorted(differ)}" if differ else ""

    def case(self, number: int) -> str:
        """Run a case; what is wrong."""
        kinds: list[Callable[[Path], str]] = [*[self.power_loss] * 6, self.goes_on, self.failing_writes]
        case = kinds[number % len(kinds)]
        directory = self.directory / "cases" / str(number)
        directory.mkdir(parents=True)
        self.said = 0
        try:
            problem = case(directory)
        except Exception as error:
            words = type(error).__name__ in ("UserError", "RunError")
            problem = f"{'' if words else f'{type(error).__name__}: '}{str(error)[:2000]}"
            if words and not self.said:
                problem = ""
                self.seen["refused in words, when nothing had been called saved"] += 1
        shown = f"WRONG: {problem}\n  kept in {directory}" if problem else "right"
        if problem or number % 20 == 19:
            print(f"case {number}, {case.__name__.replace('_', ' ')}: {shown}", flush=True)
        if not problem:
            shutil.rmtree(directory, ignore_errors=True)  # Orbax may still delete in it
        return problem


def losses(run: Path) -> dict[int, Any]:
    from trainfw.training import RunDirectory

    return {row["step"]: row["loss"] for row in RunDirectory(run).metrics() if "loss" in row}


def compile_library(target: Path) -> None:
    source = Path(__file__).parent / "lost" / "journal.c"
    if (compiler := shutil.which("cc")) is None:
        say("lost_writes.py needs a C compiler, `cc`, for benchmarks/lost/journal.c")
        sys.exit(2)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", target, source, "-ldl", "-lpthread"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lost-writes-"))
    os.environ["XDG_CACHE_HOME"] = str(directory / "xdg")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    compile_library(directory / "journal.so")
    (directory / "text").mkdir()
    for number in range(30):
        words = " ".join(f"word{number * i % 7} = {i};" for i in range(20))
        (directory / "text" / f"{number}.txt").write_text(f"document {number}: {words}\n")
    started = time.monotonic()
    lost = Lost(directory, random.Random(arguments.seed))
    lost.record()
    from trainfw import backends

    backends.prepare(1)
    wrong = sum(bool(lost.case(number)) for number in range(arguments.cases))
    print("; ".join(f"{what}: {count}" for what, count in sorted(lost.seen.items())))
    print(f"{arguments.cases - wrong} of {arguments.cases} right, in {time.monotonic() - started:.0f} s")
    if not wrong:
        shutil.rmtree(directory, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
