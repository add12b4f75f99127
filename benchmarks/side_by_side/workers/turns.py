"""One side of the conversation between `peers.py` and the processes it compares. Standard library only.

A worker says JSON lines and takes its turn when it is told how many steps to do:

    turns = Turns()              # started
    ...                          # import; build
    turns.say("imported", versions={...})
    for batch in batches:
        ...                      # one step, to the end
        turns.done(loss)         # waits between turns; leaves the process after the last

Libraries print what they like: their standard output goes to standard error, which is the worker's log.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Turns:
    def __init__(self) -> None:
        # Copies that no child inherits; what libraries and their children read and write is elsewhere.
        self._in, self._out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        self._left: int | None = None  # steps of this turn; None until the first step is done
        self._seconds: list[float] = []
        self._losses: list[float | None] = []
        self._more: list[Any] = []
        self.say("started")
        self._since = time.perf_counter()

    def say(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._out, flush=True)

    def done(self, loss: float | None, *, seconds: float | None = None, more: Any = None) -> None:
        """A step is finished. Its time is from the end of the one before, or from the start of the turn.

        Args:
            seconds: takes the place of that time.
            more: whatever else the driver is to hear of this step.
        """
        now = time.perf_counter()
        self._seconds.append(now - self._since if seconds is None else seconds)
        self._losses.append(loss)
        self._more.append(more)
        self._left = 0 if self._left is None else self._left - 1
        while not self._left:
            self._end_turn()
        self._since = time.perf_counter()

    def _end_turn(self) -> None:
        own, children = peak_memory()
        self.say(
            "turn", seconds=self._seconds, losses=self._losses, more=self._more, memory=own, children_memory=children
        )
        self._seconds, self._losses, self._more = [], [], []
        wall, cpu = time.perf_counter(), time.process_time()
        line = self._in.readline()
        self._left = int(line) if line.strip() else 0
        if self._left <= 0:  # the driver has heard enough, or is gone
            sys.stdout.flush()
            os._exit(0)
        self.say("idle", wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def peak_memory() -> tuple[int, int]:
    """Bytes: the most this process has held, and the sum of the most that each living descendant has.

    The kernel's own figure on Linux (VmHWM: unlike ru_maxrss it does not start at what the parent held); elsewhere
    ru_maxrss, and nothing of the children.
    """
    try:
        own = _high_water(os.getpid())
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024), 0
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    family = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= new
    children = 0
    for pid in family - {os.getpid()}:
        try:
            children += _high_water(pid)
        except OSError:
            continue
    return own, children


def _high_water(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: trainfw may be run from its sources."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_work() -> dict[str, Any]:
    """What to do: the file that the driver wrote, named on the command line."""
    with open(sys.argv[1]) as file:
        return json.load(file)
