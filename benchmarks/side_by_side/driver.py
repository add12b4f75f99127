"""The processes that are compared: started one after the other, then taking turns."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from side_by_side.environments import Unavailable, last_error

Say = Callable[[str], None]


@dataclass
class Record:
    """What a process has told."""

    versions: dict[str, str] = field(default_factory=dict)
    parameters: int | None = None
    first_step: float = 0.0
    """Seconds from the start of the process to the end of its first step."""
    imported: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Of each timed step."""
    losses: list[float | None] = field(default_factory=list)
    """Of each step, the first and the untimed one with them."""
    more: list[Any] = field(default_factory=list)
    memory: int = 0
    children_memory: int = 0
    idle_wall: float = 0.0
    idle_cpu: float = 0.0


class Worker:
    """One process."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float):
        self.name, self.command, self.environment, self.log, self.timeout = name, command, environment, log, timeout
        self.record = Record()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait for its first step, and one more that is not timed."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(self.environment),
                start_new_session=True,  # so that its own children end with it
            )
        threading.Thread(target=self._listen, daemon=True).start()
        self._until("imported")
        self.record.imported = time.monotonic() - begun
        self._until("turn")
        self.record.first_step = time.monotonic() - begun
        self.turn(1)
        self.record.seconds.clear()
        self.record.more.clear()

    def turn(self, steps: int) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except OSError:
            self._ended()
        self._until("turn")

    def stop(self) -> None:
        if self._process is None:
            return
        try:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _until(self, event: str) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise Unavailable(f"nothing for {self.timeout:.0f} s (its log: {self.log})") from None
            if line is None:
                self._ended()
            told = json.loads(str(line))
            record = self.record
            match told["event"]:
                case "imported":
                    record.versions = told["versions"]
                case "built":
                    record.parameters = told["parameters"]
                case "turn":
                    # What the first turn says of time holds all that came before.
                    record.seconds += told["seconds"]
                    record.losses += told["losses"]
                    record.more += told["more"]
                    record.memory = max(record.memory, told["memory"])
                    record.children_memory = max(record.children_memory, told["children_memory"])
                case "idle":
                    record.idle_wall += told["wall"]
                    record.idle_cpu += told["cpu"]
            if told["event"] == event:
                return

    def _ended(self) -> None:
        text = self.log.read_text(errors="replace")
        raise Unavailable(f"its process ended: {last_error(text)} (its log: {self.log})")


def take_turns(workers: Sequence[Worker], rounds: int, steps: Mapping[str, int], say: Say) -> dict[str, str]:
    """Start all, then let each do its steps, `rounds` times; every other round in the opposite order.

    Returns why some could not: name -> problem. The others go on without them.
    """
    problems: dict[str, str] = {}
    running: list[Worker] = []
    try:
        for worker in workers:
            say(f"{worker.name}: starting")
            try:
                running.append(worker)
                worker.start()
                say(f"{worker.name}: first step {worker.record.first_step:.1f} s after its start")
            except Unavailable as problem:
                problems[worker.name] = str(problem)
                running.remove(worker)
                worker.stop()
                say(f"{worker.name}: FAILED: {problem}")
        for count in range(1, rounds + 1):
            for worker in list(running if count % 2 else reversed(running)):
                try:
                    worker.turn(steps[worker.name])
                    recent = worker.record.seconds[-steps[worker.name] :]
                    say(f"round {count} of {rounds}: {worker.name}: {', '.join(f'{s:.2f}' for s in recent)} s")
                except Unavailable as problem:
                    problems[worker.name] = str(problem)
                    running.remove(worker)
                    worker.stop()
                    say(f"{worker.name}: FAILED: {problem}")
    finally:
        for worker in running:
            worker.stop()
    return problems
