from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal, get_args

from trainfw.errors import TRY_AGAIN
from trainfw.recipe import WatchdogConfig

Phase = Literal["start", "compile", "step", "validation", "save"]
"""Phase of a session: it reads data and weights, compiles, trains, validates (and writes samples), or waits
for a checkpoint."""
PHASES: tuple[Phase, ...] = get_args(Phase)

_POLL_SECONDS = 0.5
_STOPPED_SECONDS = 10
"""A look that comes this late: the process was stopped meanwhile (Ctrl-Z, SIGSTOP)."""


class Phases:
    """Clock of a session: its phase, the seconds of each, and a watch that it does not hang.

    Where nothing moves for longer than the phase's limit, the stacks of all threads go to stderr and the process exits
    with `TRY_AGAIN`: a process that hangs says where, and those that wait for it leave too.
    """

    def __init__(self, limits: WatchdogConfig):
        self._limits = {phase: getattr(limits, _key(phase)) for phase in PHASES}
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.lost = 0.0
        """Seconds, among those in steps, of steps that were rolled back."""
        self.phase: Phase = "start"
        self.step = 0
        """The last step known to be done."""
        self._since = self._moved = time.monotonic()
        self._looked = self._since
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Phases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        before = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now
        self.moved()

    def moved(self) -> None:
        """Something was done: the limit counts from now."""
        self._moved = time.monotonic()

    def so_far(self) -> dict[str, float]:
        """Seconds in each phase, the one that lasts included, and `lost`."""
        seconds: dict[str, float] = {str(phase): spent for phase, spent in self.seconds.items()}
        seconds[self.phase] += time.monotonic() - self._since
        seconds["step"] -= self.lost
        return seconds | {"lost": self.lost}

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            if not self._overdue(time.monotonic()):
                continue
            out, limit = sys.__stderr__, self._limits[self.phase]
            with contextlib.suppress(OSError, ValueError):  # it leaves, also where nothing can be said
                print(
                    f"\nfailed: nothing has moved for {limit:g} s in phase {self.phase!r} (watchdog."
                    f"{_key(self.phase)}) after step {self.step}; this process or one it waits for hangs. The stacks "
                    "of all threads:",
                    file=out,
                    flush=True,
                )
                faulthandler.dump_traceback(file=out or 2, all_threads=True)
            os._exit(TRY_AGAIN)

    def _overdue(self, now: float) -> bool:
        gap, self._looked = now - self._looked, now
        if gap > _STOPPED_SECONDS:
            self._moved += gap  # which was not the work's
        limit = self._limits[self.phase]
        return bool(limit) and now - self._moved > limit


def _key(phase: Phase) -> str:
    return f"{'step' if phase == 'validation' else phase}_seconds"
