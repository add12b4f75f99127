from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trainfw.program import Program
from trainfw.training.phases import Phases
from trainfw.training.reporter import Reporter


class Compiling:
    """A program's functions, compiled in a thread of their own while the run reads data and weights.

    `trains` says whether the run is thought to take a step: a damaged checkpoint may make it one.

    As a context it stops what is not begun. What is being compiled ends up in the cache, unless the process ends first.
    """

    def __init__(self, program: Program, reporter: Reporter, phases: Phases, *, trains: bool):
        self._program, self._reporter, self._phases = program, reporter, phases
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compiling")
        self._train: Future[Any] | None = None
        self._eval: Future[Any] | None = None
        self._said = False
        if trains:
            self._begin()
        if program.recipe.train.validation_batches != 0:
            self._eval = self._thread.submit(program.compile_eval_step)

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Until nothing is being compiled."""
        for compiled in (self._train, self._eval):
            if compiled is not None:
                self._wait(compiled)

    def train_step(self) -> Any:
        """`Program.train_step`, compiled now if not before. Raises what compiling raises."""
        compiled, seconds = self._wait(self._train or self._begin())
        if not self._said:
            self._reporter.note(f"compiled in {seconds:.1f} s")
        self._said = True
        return compiled

    def eval_step(self) -> Any:
        """`Program.eval_step`, likewise; None where the run does not validate."""
        return None if self._eval is None else self._wait(self._eval)

    def _begin(self) -> Future[Any]:
        def compiled() -> tuple[Any, float]:
            start = time.monotonic()
            return self._program.compile_train_step(), time.monotonic() - start

        self._reporter.note("compiling the training step")
        self._train = self._thread.submit(compiled)
        return self._train

    def _wait(self, compiled: Future[Any]) -> Any:
        with self._phases.during("compile"):
            return compiled.result()
