from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfw.training.phases import PHASES
from trainfw.training.records import SessionRow, append_rows, stream_rows
from trainfw.training.resuming import Changed

_LONGEST_RESTART = 30 * 24 * 3600.0
"""Between sessions that no clock but that of the calendar has in common; what is longer says that it was set."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they went to, over all its sessions."""

    seconds: Mapping[str, float]
    """Seconds by phase; `lost`: steps that a later session did again; `restart`: from one session to the next."""
    sessions: int
    unknown: int = 0
    """Restarts of which the clocks do not tell how long they took; they are not counted."""

    @property
    def fraction(self) -> float:
        """The part in steps that were kept; 0 where there was no time."""
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else 0.0

    def __str__(self) -> str:
        parts = [f"{name} {_duration(value)}" for name, value in self.seconds.items() if value >= 0.5]
        many = f" in {self.sessions} sessions" if self.sessions > 1 else ""
        left_out = f"; not counted: {self.unknown} restart{'s' * (self.unknown > 1)}, for the clock was set meanwhile"
        return (
            f"goodput {self.fraction:.1%} of {_duration(sum(self.seconds.values()))}{many}: {', '.join(parts)}"
            f"{left_out if self.unknown else ''}"
        )


class Sessions:
    """sessions.jsonl of a run: how far each session got and how long each phase took it, written as it goes."""

    def __init__(
        self, file: Path, resumed_step: int, spent: float = 0.0, *, changed: Changed | None = None, writes: bool = True
    ):
        """`changed`: keys of the recipe with their values in the session before and in this one."""
        self._writes, self._changed = writes, changed
        self._file, self.first = file, resumed_step
        last = {row["session"]: row for row in stream_rows(file, SessionRow)}
        self._earlier = [last[number] for number in sorted(last)]
        self._number = len(self._earlier)
        self._began = time.monotonic() - spent  # what times are told by: the calendar's clock may be set meanwhile
        self._started = time.time() - spent
        self._boot = _BOOT.read_text().strip() if _BOOT.is_file() else None

    def write(self, step: int, seconds: Mapping[str, float], end: str | None = None) -> None:
        """`end`: why the session ends, in a word or two."""
        if not self._writes:
            return
        row = self._row(step, seconds) | ({"end": end} if end else {})
        if self._changed:
            row["changed"], self._changed = self._changed, None  # said once
        with contextlib.suppress(OSError):  # no reason to end a run
            append_rows(self._file, [row])

    def goodput(self, step: int, seconds: Mapping[str, float]) -> Goodput:
        return goodput([*self._earlier, self._row(step, seconds)])

    def _row(self, step: int, seconds: Mapping[str, float]) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "session": self._number,
            "from": self.first,
            "step": step,
            "started": self._started,
            "time": self._started + now - self._began,
            "boot": self._boot,
            "uptime": now,
            **{f"{name}_seconds": round(max(value, 0.0), 3) for name, value in seconds.items()},
        }


def goodput(rows: Sequence[Mapping[str, Any]]) -> Goodput:
    """Add up the last rows of the sessions, given in order."""
    seconds = {name: sum(row.get(f"{name}_seconds", 0.0) for row in rows) for name in (*PHASES, "lost")}
    restarts: list[float | None] = []
    kept = float("inf")
    for before, row in reversed(list(zip([None, *rows], rows))):
        done, again = row["step"] - row["from"], row["step"] - max(kept, row["from"])
        if done > 0 and again > 0:
            lost = row.get("step_seconds", 0.0) * again / done
            seconds["step"] -= lost
            seconds["lost"] += lost
        kept = min(kept, row["from"])  # what a later session started from is all that is left of this one
        if before is not None:
            restarts.append(_between(before, row))
    known = [between for between in restarts if between is not None]
    return Goodput({**seconds, "restart": sum(known)}, len(rows), len(restarts) - len(known))


def _between(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Seconds from a session's last word to the start of the next; None where nobody knows."""
    seconds = after["started"] - before["time"]
    uptimes = before.get("uptime"), after.get("uptime")
    if before.get("boot") == after.get("boot") is not None and None not in uptimes:
        # One machine, which was not started anew: it has counted seconds, whatever its calendar says.
        return max(uptimes[1] - (after["time"] - after["started"]) - uptimes[0], 0.0)
    return seconds if 0 <= seconds <= _LONGEST_RESTART else None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
