from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from trainfw.backends import exchange
from trainfw.errors import RunError
from trainfw.objectives import Metrics
from trainfw.recipe import FaultsConfig
from trainfw.training.records import append_rows, rewrite_rows
from trainfw.training.run_directory import RunDirectory

_STEPS = 10
"""Steps of which the median loss is taken."""
_TIMES = 10
"""Growth of the loss that is reported."""
_NATS = 0.1
"""A loss below this is as good as none: ten times it is no growth."""

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
    """Name the fault of a finished step, as the devices saw it."""
    judged: tuple[str, ...] = ("loss", "grad_norm", "update_norm")
    values = {name: metrics[name].value() for name in judged if name in metrics}
    if not all(map(math.isfinite, values.values())):
        return BadStep(step, row, "non_finite", values, config.non_finite)
    if "spike" in metrics and metrics["spike"].value():
        return BadStep(step, row, "spike", values, config.spike)
    return None


class Growth:
    """Watch for a training loss that has grown and stays so: most often the learning rate is too high.

    Judged by the median of the last steps, which a spike that comes back does not move: ten times the lowest it has
    been, and no less than where the run began. (A model that has learnt its data by heart is far from there.)

    Args:
        began: the first logged loss of the run, where it goes on.
    """

    def __init__(self, began: float | None = None):
        self.began, self.lowest = began, began
        self.now = math.nan
        """The median."""
        self._last: deque[float] = deque(maxlen=_STEPS)
        self._told = False

    def seen(self, loss: float, *, last: bool = False) -> bool:
        """Tell, once, whether this step's loss shows it; the last step of a run is judged by what there is."""
        if not math.isfinite(loss):
            return False  # the policies' business
        self._last.append(loss)
        self.began = loss if self.began is None else self.began
        self.lowest = loss if self.lowest is None else self.lowest
        if len(self._last) < (_STEPS // 3 if last else _STEPS):
            return False
        self.now = statistics.median(self._last)
        self.lowest = min(self.lowest, self.now)
        grown = self.now >= self.began and self.now > _TIMES * max(self.lowest, _NATS)
        told, self._told = self._told, self._told or grown
        return grown and not told

    def forget(self) -> None:
        """The last steps are to be done again."""
        self._last.clear()


class FaultLog:
    """faults.jsonl of a run: its bad steps, and what was made of them.

    Args:
        resumed_step: where this session starts. What was skipped after it will be seen again.
        writes: whether this process is the one that writes.
    """

    def __init__(self, run: RunDirectory, config: FaultsConfig, resumed_step: int, writes: bool):
        self._file, self._config, self._writes = run.faults_file, config, writes
        self.batch_rows = 1
        """Rows of a step, which its stage says."""
        self._in_a_row = 0
        self.limit = ""
        """Why a step that the recipe has another policy for ends the run, if it does."""
        self._rows = run.faults()
        self._behind = False
        """The file does not hold all rows: the disk took none."""
        self.rewind(resumed_step)

    @property
    def rows(self) -> set[int]:
        """The rows that rollbacks leave out."""
        return {first for row in self._of("rollback") for first in range(row["row"], row["row"] + row["rows"])}

    def counts(self) -> dict[str, int]:
        return {"skipped_steps": len(self._of("skip")), "rollbacks": len(self._of("rollback"))}

    def rewind(self, step: int) -> None:
        """Steps after `step` are to be done again: forget what was skipped of them."""
        kept = [row for row in self._rows if row["policy"] == "rollback" or row["step"] <= step]
        self._behind |= len(kept) < len(self._rows)
        self._rows = kept
        with contextlib.suppress(OSError):
            self.catch_up()

    def catch_up(self) -> None:
        """Write what the disk did not take before. Raises OSError where it takes none now."""
        if self._writes and self._behind:
            rewrite_rows(self._file, self._rows)
        self._behind = False

    def good(self) -> None:
        self._in_a_row = 0

    def write(self, bad: BadStep) -> Policy:
        """The policy for this step, written down."""
        self._in_a_row += 1
        policy = bad.policy
        rollbacks = self.counts()["rollbacks"]
        if self._in_a_row > self._config.most or (policy == "rollback" and rollbacks >= self._config.most):
            policy = "stop"
            self.limit = f"; more than faults.most = {self._config.most}"
        values = {name: value if math.isfinite(value) else str(value) for name, value in bad.values.items()}
        try:
            self._add(bad.step, bad.row, bad.kind, policy, values)
        except OSError as error:
            if policy == "rollback":  # one that is not written down would be lost with this session
                raise RunError(f"{bad}; {self._file} cannot be written: {error.strerror}") from error
        return policy

    def grown(self, step: int, row: int, growth: Growth) -> None:
        """Write down that the loss has grown; where that cannot be, it was said, and the run goes on."""
        with contextlib.suppress(OSError):
            self._add(step, row, "growth", "none", {"loss": growth.now, "lowest_loss": growth.lowest})

    def _add(self, step: int, first: int, kind: str, policy: str, values: Mapping[str, object]) -> None:
        """Raises OSError where it is not on disk: it will be with the next."""
        row = {"step": step, "kind": kind, "policy": policy, "row": first, "rows": self.batch_rows, **values}
        self._rows.append(row)
        if not self._writes:
            return
        behind, self._behind = self._behind, True
        if behind:
            rewrite_rows(self._file, self._rows)
        else:
            append_rows(self._file, [row], durable=True)
        self._behind = False

    def _of(self, policy: Policy) -> list[dict[str, Any]]:
        return [row for row in self._rows if row["policy"] == policy]


def compare_replicas(params: Any, name: str) -> None:
    """Check that devices which hold the same part of a parameter hold the same bits.

    Each process hashes what its devices keep (copied to the host, array by array). `name` is this comparison's own.
    Raises RunError, in every process, naming the array and the devices that differ from the most.
    """
    mine: dict[str, dict[str, str]] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        if all(shard.replica_id == 0 for shard in array.global_shards):
            continue
        key = ".".join(str(part.key) for part in path)
        for shard in array.addressable_shards:
            digest = hashlib.blake2b(np.asarray(shard.data).tobytes(), digest_size=8).hexdigest()
            slices = ", ".join(f"{part.start or 0}:{part.stop or ''}" for part in shard.index)
            whole = all(part.start is None and part.stop is None for part in shard.index)
            mine.setdefault(key if whole else f"{key}[{slices}]", {})[str(shard.device)] = digest
    found: dict[str, dict[str, str]] = {}
    for part in exchange(name, mine):
        for key, digests in part.items():
            found.setdefault(key, {}).update(digests)
    for key, digests in found.items():
        ((most, _),) = Counter(digests.values()).most_common(1)
        if odd := [device for device, digest in digests.items() if digest != most]:
            raise RunError(
                f"replicas differ: {key} on {', '.join(odd)} is not what {len(digests) - len(odd)} other devices have; "
                "a device computes or remembers wrongly, and what was saved since the last comparison may be wrong"
            )
