"""The share of its time that a run spends on steps that count, when instances fail: checkpoints, restarts, spares.

Failures are a Poisson process, each of which stops the job: with n instances it fails every M = MTBF / n on average.
Checkpoints are as `trainfw.checkpoint` makes them: a step waits while the state is copied to the host (delta), and
the file is written beside the steps that follow (w). So a failure loses the work since the last checkpoint that was
whole on disk, and then R passes until the next step: detection, restart, and every replica reading the state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from trainfw.hardware import Topology
from trainfw.parallel import Layout
from trainfw.planning.predict.closed_form import state_bytes
from trainfw.recipe import Recipe

MAX_SPARES = 100_000
"""Spare units that are tried at most."""


def young_interval(copy: float, mtbf: float) -> float:
    """Seconds of work between checkpoints, to first order: sqrt(2 delta M).

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974, 530-531.
    """
    return math.sqrt(2 * copy * mtbf)


def daly_interval(copy: float, mtbf: float) -> float:
    """Seconds of work between checkpoints, to higher order.

        sqrt(2 delta M) (1 + 1/3 (delta / 2M)^(1/2) + 1/9 (delta / 2M)) - delta    where delta < 2M, else M

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, 303-312.
    The optimum depends on neither the restart nor the write beside the steps.
    """
    if copy >= 2 * mtbf:
        return mtbf
    ratio = copy / (2 * mtbf)
    return young_interval(copy, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - copy


def checkpoint_goodput(work: float, copy: float, mtbf: float, restart: float, write: float = 0.0) -> float:
    """Useful time over wall time with a checkpoint after every `work` seconds of steps.

    Daly's complete model (FGCS 22(3), 2006, section 3), in which restarts fail as well: wall time over useful time is
    M e^(R/M) (e^((tau + delta)/M) - 1) / tau. With a write beside the steps, the first checkpoint after a failure
    counts only after tau + delta + w, every other tau + delta after the one before (or w + delta, as a save waits for
    the write before it). Between two failures, M e^(R/M) apart, e^(-(tau + delta + w)/M) / (1 - e^(-(tau + delta)/M))
    checkpoints count on average. Without w, that is Daly's.

    Args:
        copy: seconds that a checkpoint stops the steps (delta).
        mtbf: of the job (M).
        restart: seconds from a failure to the next step (R).
        write: seconds that a checkpoint is written beside the steps (w).
    """
    first, cycle = work + copy + write, max(work, write) + copy
    return work / mtbf * math.exp(-(restart + first) / mtbf) / -math.expm1(-cycle / mtbf)


def down_exactly(down: float, k: int) -> float:
    """The share of time in which k units are out of service, of which `down` are on average.

    Failures at a rate lambda, each repaired in R on average however many others are: an M/G/infinity queue, in which
    the number in service is Poisson with mean lambda R for any distribution of repair times (Palm's theorem;
    Sherbrooke, "METRIC", Operations Research 16(1), 1968, 122-141).
    """
    return math.exp(k * math.log(down) - down - math.lgamma(k + 1))


@dataclass(frozen=True)
class Spares:
    """A job with so many units more than it needs."""

    spares: int
    availability: float
    """Share of time in which enough units work; without, the job waits for a repair."""
    goodput: float
    """Share of the wall time that trains, with the suggested checkpoints."""
    goodput_per_rented_chip: float
    """`goodput`, times units needed over units rented."""


@dataclass(frozen=True)
class Goodput:
    """One job with failures."""

    count: int
    """Units."""
    instances: int
    mtbf_seconds: float
    state_bytes: int
    """Bytes of a checkpoint: parameters and optimizer state, once."""
    copy_seconds: float
    """Part of a save during which a step waits."""
    write_seconds: float
    """Part of a save that runs beside the steps."""
    read_seconds: float
    """Seconds in which every replica reads a checkpoint."""
    restart_seconds: float
    """Seconds from a failure to the next step: detection, restart, `read_seconds`."""
    young_interval_seconds: float
    """Work between checkpoints at the optimum, to first order."""
    daly_interval_seconds: float
    """Work between checkpoints at the optimum, to higher order (Daly)."""
    checkpoint_every: int
    """The recipe's checkpoint.every, in steps; 0: only at the end."""
    goodput_at_checkpoint_every: float
    """Goodput with the recipe's own interval, while enough units work."""
    suggested_checkpoint_every: int
    """checkpoint.every at the optimum."""
    goodput_at_suggested: float
    """Goodput with the suggested interval, while enough units work."""
    units_down: float
    """Units out of service, on average."""
    spares: tuple[Spares, ...]
    """Rows for 0, 1, 2, ... spare units, past the best."""

    @property
    def best(self) -> Spares:
        """Return the row whose spares give most work a rented unit."""
        return max(self.spares, key=lambda spares: spares.goodput_per_rented_chip)

    @property
    def first_spare(self) -> float:
        """Return how much more work a job does with one spare unit than with none, as a share."""
        # e^-down (1 + down) over e^-down, which may be too small for a float.
        return self.units_down

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"best_spares": self.best.spares, "first_spare_gain": self.first_spare}


def goodput_of(recipe: Recipe, topology: Topology, layout: Layout, step_seconds: float) -> Goodput:
    """Predict what share of the time failures leave to `recipe` on `topology`, whose step takes `step_seconds`."""
    figure = {key: value.number for key, value in topology.figures.items()}
    state = sum(state_bytes(recipe, Layout()).values())
    replicas, instances, units = layout.data, topology.instances, topology.count
    # One replica writes. (Orbax shares the writing out among replicas only where their number divides an array's
    # shards.) All read.
    writers = max(1, instances // replicas)
    copy = sum(state_bytes(recipe, layout).values()) * topology.cores_per_chip / figure["storage.host_copy"]
    write = state / min(writers * figure["storage.bandwidth"], figure["storage.total"])
    read = state * replicas / min(instances * figure["storage.bandwidth"], figure["storage.total"])
    restart = figure["reliability.detection"] + figure["reliability.restart"] + read
    mtbf = figure["reliability.instance_mtbf"] / instances
    share = functools.partial(checkpoint_goodput, copy=copy, mtbf=mtbf, restart=restart, write=write)

    steps, daly = recipe.train.steps, daly_interval(copy, mtbf)
    suggested = min(max(1, round(max(daly, write) / step_seconds)), steps)
    ours = share(suggested * step_seconds)
    down = instances * figure["reliability.repair"] / figure["reliability.instance_mtbf"]
    return Goodput(
        count=units,
        instances=instances,
        mtbf_seconds=mtbf,
        state_bytes=state,
        copy_seconds=copy,
        write_seconds=write,
        read_seconds=read,
        restart_seconds=restart,
        young_interval_seconds=young_interval(copy, mtbf),
        daly_interval_seconds=daly,
        checkpoint_every=recipe.checkpoint.every,
        goodput_at_checkpoint_every=share(min(recipe.checkpoint.every or steps, steps) * step_seconds),
        suggested_checkpoint_every=suggested,
        goodput_at_suggested=ours,
        units_down=down,
        spares=tuple(_spares(units, down, ours)),
    )


def _spares(units: int, down: float, goodput: float) -> Iterator[Spares]:
    """Try no spares, up to three, and on to where more no longer pay, or four times the units."""
    most = min(max(100, 4 * units), MAX_SPARES)
    if down > most:
        most = 3  # out of reach: it never runs
    best = available = 0.0
    for spares in range(most + 1):
        available = min(1.0, available + down_exactly(down, spares))
        each = available * goodput * units / (units + spares)
        yield Spares(spares, available, available * goodput, each)
        if spares >= max(3, down) and each < best:
            return
        best = max(best, each)


def assumed(topology: Topology) -> Iterator[str]:
    """The figures of failures and storage that a goodput was computed with, in words with their sources."""
    for key, what in {
        "reliability.instance_mtbf": "mean time between failures of an instance",
        "reliability.detection": "detection of a failure",
        "reliability.restart": "restart",
        "reliability.repair": "repair",
        "storage.host_copy": "copying state to the host, a chip",
        "storage.bandwidth": "storage, an instance",
        "storage.total": "storage, in all",
    }.items():
        figure = topology.figures[key]
        source = "" if figure.source == "none" else figure.source
        about = "; ".join(filter(None, (source, "" if figure.source == "the recipe" else figure.note)))
        yield f"{what}: {figure.value} ({about}) [{key}]"
    yield "every failure takes its whole unit out until the repair; spares do not fail while they wait"
    yield "one replica writes a checkpoint; every replica reads it, so that reading grows with their number"
