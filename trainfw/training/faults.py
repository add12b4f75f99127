from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from trainfw.errors import RunError
from trainfw.program import Metrics
from trainfw.training.config import FaultsConfig
from trainfw.training.run_directory import RunDirectory

Policy = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class BadStep:
    """A step that `faults` has a policy for."""

    step: int
    row: int
    """The first row of its batch, in the endless order of the run's rows."""
    kind: Literal["non_finite", "spike"]
    values: dict[str, float]
    policy: Policy

    def __str__(self) -> str:
        if self.kind == "non_finite":
            name, value = next((n, v) for n, v in self.values.items() if not math.isfinite(v))
            return f"step {self.step}: {name} is {value}"
        return f"step {self.step}: a spike: " + ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())


def judge_step(step: int, row: int, metrics: Metrics, config: FaultsConfig) -> BadStep | None:
    """What is wrong with a finished step, as the devices saw it."""
    judged: tuple[str, ...] = ("loss", "grad_norm", "update_norm")
    values = {name: metrics[name].value() for name in judged if name in metrics}
    if not all(map(math.isfinite, values.values())):
        return BadStep(step, row, "non_finite", values, config.non_finite)
    if "spike" in metrics and metrics["spike"].value():
        return BadStep(step, row, "spike", values, config.spike)
    return None


class FaultLog:
    """faults.jsonl of a run: its bad steps, and what was made of them.

    Args:
        resumed_step: where this session starts. What was skipped after it will be seen again.
        writes: whether this process is the one that writes.
    """

    def __init__(self, run: RunDirectory, config: FaultsConfig, batch_rows: int, resumed_step: int, writes: bool):
        self._file, self._config, self._batch_rows, self._writes = run.faults_file, config, batch_rows, writes
        self._run, self._in_a_row = run, 0
        self.limit = ""
        """Why a step that the recipe has another policy for ends the run, if it does."""
        self._rows = list(run.faults())
        self.rewind(resumed_step)

    @property
    def rows(self) -> set[int]:
        """The rows that rollbacks leave out."""
        return {first for row in self._of("rollback") for first in range(row["row"], row["row"] + row["rows"])}

    def counts(self) -> dict[str, int]:
        return {"skipped_steps": sum(1 for _ in self._of("skip")), "rollbacks": sum(1 for _ in self._of("rollback"))}

    def rewind(self, step: int) -> None:
        """Steps after `step` are to be done again: forget what was skipped of them."""
        kept = [row for row in self._rows if row["policy"] == "rollback" or row["step"] <= step]
        if self._writes and len(kept) < len(self._rows):
            self._run.rewrite(self._file, kept)
        self._rows = kept

    def good(self) -> None:
        """A step was good."""
        self._in_a_row = 0

    def write(self, bad: BadStep) -> Policy:
        """The policy for this step, written down."""
        self._in_a_row += 1
        policy = bad.policy
        rollbacks = self.counts()["rollbacks"]
        if self._in_a_row > self._config.most or (policy == "rollback" and rollbacks >= self._config.most):
            policy = "stop"
            self.limit = f"; more than faults.most = {self._config.most}"
        row = {
            "step": bad.step,
            "kind": bad.kind,
            "policy": policy,
            "row": bad.row,
            "rows": self._batch_rows,
            **{name: value if math.isfinite(value) else str(value) for name, value in bad.values.items()},
        }
        self._rows.append(row)
        if self._writes:
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:  # a rollback that is not written down would be lost with this session
                raise RunError(f"{bad}; {self._file} cannot be written: {error.strerror}") from error
        return policy

    def _of(self, policy: Policy) -> Iterator[dict[str, Any]]:
        return (row for row in self._rows if row["policy"] == policy)
