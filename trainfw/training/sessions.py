from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.training.phases import PHASES
from trainfw.training.resuming import Changed


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, over all its sessions. Seconds."""

    seconds: Mapping[str, float]
    """By phase; `lost`: of steps that a later session did again; `restart`: from a session's last word to the next."""
    sessions: int

    @property
    def fraction(self) -> float:
        """The part in steps that were kept; 0 where there was no time."""
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else 0.0

    def __str__(self) -> str:
        parts = [f"{name} {_duration(value)}" for name, value in self.seconds.items() if value >= 0.5]
        many = f" in {self.sessions} sessions" if self.sessions > 1 else ""
        return f"goodput {self.fraction:.1%} of {_duration(sum(self.seconds.values()))}{many}: {', '.join(parts)}"


class Sessions:
    """sessions.jsonl of a run: how far each session got and how long each phase took it, written as it goes."""

    def __init__(
        self,
        file: Path,
        resumed_step: int,
        spent: float = 0.0,
        *,
        changed: Changed | None = None,
        writes: bool = True,
    ):
        """`changed`: keys of the recipe with their values in the session before and in this one."""
        self._writes, self._changed = writes, changed
        self._file, self.first = file, resumed_step
        self._earlier = _last_words(file)
        self._number = len(self._earlier)
        self._started = time.time() - spent

    def write(self, step: int, seconds: Mapping[str, float], end: str | None = None) -> None:
        """`end`: why the session ends, in a word or two."""
        if not self._writes:
            return
        row = self._row(step, seconds) | ({"end": end} if end else {})
        if self._changed:
            row["changed"], self._changed = self._changed, None  # said once
        with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as file:  # no reason to end a run
            file.write(json.dumps(row) + "\n")

    def goodput(self, step: int, seconds: Mapping[str, float]) -> Goodput:
        return goodput([*self._earlier, self._row(step, seconds)])

    def _row(self, step: int, seconds: Mapping[str, float]) -> dict[str, Any]:
        return {
            "session": self._number,
            "from": self.first,
            "step": step,
            "started": self._started,
            "time": time.time(),
            **{f"{name}_seconds": round(value, 3) for name, value in seconds.items()},
        }


def goodput(rows: Sequence[Mapping[str, Any]]) -> Goodput:
    """Of the last row of each session, in order."""
    seconds = {name: sum(row.get(f"{name}_seconds", 0.0) for row in rows) for name in (*PHASES, "lost")}
    restart, kept = 0.0, float("inf")
    for i in range(len(rows) - 1, -1, -1):
        row = rows[i]
        done, again = row["step"] - row["from"], row["step"] - max(kept, row["from"])
        if done > 0 and again > 0:
            lost = row.get("step_seconds", 0.0) * again / done
            seconds["step"] -= lost
            seconds["lost"] += lost
        kept = min(kept, row["from"])  # what a later session started from is all that is left of this one
        if i:
            restart += max(row["started"] - rows[i - 1]["time"], 0.0)
    return Goodput({**seconds, "restart": restart}, len(rows))


def _last_words(file: Path) -> list[dict[str, Any]]:
    last: dict[int, dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                last[int(row["session"])] = row | {key: float(row[key]) for key in ("from", "step", "started", "time")}
    return [last[number] for number in sorted(last)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
