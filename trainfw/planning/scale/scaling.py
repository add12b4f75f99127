"""A recipe on more and more of its hardware: strong and weak scaling, and what failures leave of it.

More units mean more replicas: `data`, the outermost axis, grows with the count, and all else of the layout stays. So
what one core computes depends on its rows alone, and a step is compiled once for every number of rows, with two
replicas at most; only its placement, its collectives over `data` and its time differ from count to count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from trainfw.errors import UserError
from trainfw.hardware import MAX_COUNT, in_any_unit, in_seconds
from trainfw.parallel import Layout
from trainfw.planning.predict.plan import Plan, planned
from trainfw.planning.read_step.analysis import REPLICAS, simulated_cores
from trainfw.planning.read_step.compile_cache import Compiled, compiled
from trainfw.planning.scale.goodput import Goodput, assumed, goodput_of
from trainfw.recipe import Recipe
from trainfw.tables import table

_GIB = 2**30


@dataclass(frozen=True)
class Row:
    """Prediction for one count of units."""

    count: int
    plan: Plan | None
    goodput: Goodput | None
    problem: str = ""

    @property
    def data_share(self) -> float:
        """Return the share of a step that waits for collectives over `data` (and axes beside it)."""
        assert self.plan is not None
        time = self.plan.time
        return sum(s for axes, s in time.parts.items() if "data" in axes.split("+")) / time.seconds


@dataclass(frozen=True, repr=False)
class Scaling:
    """Predictions for one recipe on several counts of its topology, fewest first."""

    recipe: Recipe
    weak: tuple[Row, ...]
    """The global batch grows with the count."""
    strong: tuple[Row, ...]
    """The global batch is the recipe's."""

    def __repr__(self) -> str:
        return f"<Scaling: {self.recipe.name} at {len(self.weak)} counts of its topology>"

    @property
    def counted(self) -> tuple[str, int]:
        """Return `tokens` or `images`, and how many of the recipe's run, which every row trains on."""
        unit, count = self.recipe.counted
        return f"{unit}s", self.recipe.train.steps * count

    @property
    def counted_in_words(self) -> str:
        unit, count = self.counted
        return f"{count / 1e9:,.1f}G {unit}"

    @property
    def assumptions(self) -> list[str]:
        """List the assumptions about many units, failures and storage."""
        topology = self.recipe.hardware.load()
        assert topology is not None
        network = "the network gives every chip its bandwidth at any count of units, and no core lags behind the others"
        return [network, *assumed(topology)]

    def days(self, row: Row) -> float:
        """Return the days of the run, counting steps alone."""
        assert row.plan is not None
        return self.counted[1] / row.plan.units_per_second / 86400

    def chip_hours(self, row: Row, *, failures: bool) -> float:
        """Return the run's chip hours: steps alone, or with failures, suggested checkpoints and the best spares."""
        assert row.plan is not None
        assert row.goodput is not None
        hours = 24 * self.days(row) * row.plan.topology.chips
        return _over(hours, row.goodput.best.goodput_per_rented_chip) if failures else hours

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys; a row without a plan has `count` and its `problem` alone.

        `scaling.weak` and `scaling.strong` are lists of rows: `count` (units), `chips`, `cores`, `data`,
        `global_batch_size`, `accumulation_steps`, `step_time_seconds`, `step_time_range_seconds`,
        `tokens_per_second` (of images `images_per_second`), `mfu`, `efficiency` (that of a chip, over that at the
        fewest units), `bound_by`, `memory_bytes_per_core` (the total), `memory_capacity_bytes_per_core`, `data_share`
        (of the step, waiting for collectives over data), and for the run of `scaling.tokens` tokens (or
        `scaling.images`) `days`, `chip_hours`, `dollars` (steps alone), `goodput`, `chip_hours_with_failures`,
        `dollars_with_failures` (null where the run never ends).

        `goodput.weak` and `goodput.strong` have a `Goodput.to_json` for every row with a plan; `goodput.assumptions`
        are in words.
        """
        unit, count = self.counted
        return {
            "scaling": {
                "unit": self.recipe.hardware.topology,
                unit: count,
                "weak": [self._row(row, self.weak) for row in self.weak],
                "strong": [self._row(row, self.strong) for row in self.strong],
            },
            "goodput": {
                "weak": [row.goodput.to_json() for row in self.weak if row.goodput is not None],
                "strong": [row.goodput.to_json() for row in self.strong if row.goodput is not None],
                "assumptions": self.assumptions,
            },
        }

    def _row(self, row: Row, rows: Sequence[Row]) -> dict[str, object]:
        plan, price = row.plan, self.recipe.hardware.dollars_per_chip_hour
        if plan is None or row.goodput is None:
            return {"count": row.count, "problem": row.problem}
        hours, failing = (self.chip_hours(row, failures=failures) for failures in (False, True))
        ends = math.isfinite(failing)
        return {
            "count": row.count,
            "problem": None,
            "chips": plan.topology.chips,
            "cores": plan.topology.cores,
            "data": plan.layout.data,
            "global_batch_size": plan.recipe.train.global_batch_size,
            "accumulation_steps": plan.recipe.train.accumulation_steps,
            "step_time_seconds": plan.time.seconds,
            "step_time_range_seconds": [plan.time.low, plan.time.high],
            f"{self.counted[0]}_per_second": plan.units_per_second,
            "mfu": plan.mfu,
            "efficiency": efficiency(row, rows),
            "bound_by": plan.time.bound_by,
            "memory_bytes_per_core": plan.memory.total,
            "memory_capacity_bytes_per_core": plan.topology.hbm_size,
            "data_share": row.data_share,
            "days": self.days(row),
            "chip_hours": hours,
            "dollars": None if price is None else price * hours,
            "goodput": row.goodput.best.goodput,
            "chip_hours_with_failures": failing if ends else None,
            "dollars_with_failures": price * failing if price is not None and ends else None,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def efficiency(row: Row, rows: Sequence[Row]) -> float:
    """Tokens or images a second of a chip, over that at the fewest units of `rows` that have a plan."""
    plans = [one.plan for one in (row, *rows) if one.plan is not None]
    own, first = (plan.units_per_second / plan.topology.chips for plan in plans[:2])
    return own / first


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,4,16` as counts of units, fewest first. Raises UserError for what is no such list."""
    words = {word for word in re.split(r"[\s,;]+", text) if word}
    counts = sorted({int(word) for word in words if re.fullmatch("[0-9]{1,9}", word) and 0 < int(word) <= MAX_COUNT})
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text) or len(counts) < len(words):
        nearest = counts if len(counts) > 1 else sorted({n for n in (*counts, 1, 4, 16) if n >= max(counts, default=1)})
        how = f"counts of units from 1 to {MAX_COUNT:,} with commas between them, such as {','.join(map(str, nearest))}"
        raise UserError(f"--scale {text!r}: expected {how}")
    return tuple(counts)


def at_count(recipe: Recipe, count: int, *, strong: bool) -> Recipe:
    """`recipe` on `count` units of its topology, with as many more replicas.

    Weak scaling: the global batch has as many more rows, and a core the same. Strong: the global batch stays; a core
    takes fewer microbatches of the same rows, as long as there is more than one, then fewer rows.

    Raises UserError where the replicas or the rows do not come out whole.
    """
    topology = recipe.hardware.load()
    if topology is None:
        raise recipe.error("hardware.topology", "a plan needs hardware to be for; see trainfw topology")
    with recipe.blamed("parallel"):
        own = Layout.resolve(recipe.parallel, topology.cores)
    data, rest = divmod(own.data * count, topology.count)
    if rest or not data:
        per = f"{topology.count:,} units hold {own.data:,} replica{'s' * (own.data > 1)}"
        raise UserError(f"{per}: {count:,} hold no whole number of them")
    layout, train = replace(own, data=data), recipe.train
    rows = train.global_batch_size if strong else train.global_batch_size * data // own.data
    shards = layout.batch_shards
    if rows % shards:
        raise UserError(
            f"a global batch of {rows:,} sequences does not divide over {layout.batch_product} = {shards:,}; "
            f"a train.global_batch_size of {-(-rows // shards) * shards:,} would"
        )
    each = rows // shards
    most = max(1, train.global_batch_size // own.batch_shards // train.accumulation_steps)
    held = next(held for held in range(min(most, each), 0, -1) if each % held == 0)
    return recipe.model_copy(
        update={
            "hardware": recipe.hardware.model_copy(update={"count": count}),
            "parallel": recipe.parallel.model_copy(update=layout.sizes),
            "train": train.model_copy(update={"global_batch_size": rows, "accumulation_steps": each // held}),
        }
    )


def ladder(recipe: Recipe, counts: Sequence[int], *, strong: bool) -> dict[int, Recipe | str]:
    """List by count of units the recipe that would run there, or why none would; compiles nothing."""
    rungs: dict[int, Recipe | str] = {}
    for count in counts:
        try:
            sized = at_count(recipe, count, strong=strong)
            sized.hardware.load()
            simulated_cores(_compiled_in_place_of(sized))
            rungs[count] = sized
        except UserError as error:
            rungs[count] = str(error)
    return rungs


def scaling_cores(recipe: Recipe, counts: Sequence[int]) -> int:
    """Devices that a process must simulate for `scale`."""
    rungs = [sized for strong in (False, True) for sized in ladder(recipe, counts, strong=strong).values()]
    return max((simulated_cores(_compiled_in_place_of(r)) for r in rungs if not isinstance(r, str)), default=1)


def scale_out(
    recipe: Recipe,
    counts: Sequence[int],
    progress: Callable[[str], None] = lambda _: None,
    *,
    simulate: int | None = None,
    fresh: bool = False,
) -> Scaling:
    """Plan `recipe` on each count of its topology's units (see `parse_counts`). Further args are those of `compiled`.

    A count that the recipe cannot run on is a row that says why.
    """
    steps: dict[str, Compiled] = {}

    def row(count: int, sized: Recipe | str, name: str) -> Row:
        if isinstance(sized, str):
            return Row(count, None, None, sized)
        small = _compiled_in_place_of(sized)
        key = str((small.train.global_batch_size, small.train.accumulation_steps, small.parallel.data))
        if key not in steps:
            steps[key] = compiled(small, progress, simulate=simulate, fresh=fresh)
        step = steps[key]
        layout = replace(step.analysis.layout, data=sized.parallel.data)
        try:
            plan = planned(sized, replace(step, analysis=replace(step.analysis, layout=layout)))
        except UserError as error:
            return Row(count, None, None, str(error))
        progress(f"{name}, {count:,}: {plan.units_per_second:,.0f} {plan.unit}s/s")
        return Row(count, plan, goodput_of(sized, plan.topology, plan.layout, plan.time.seconds))

    weak = tuple(row(*rung, "weak") for rung in ladder(recipe, counts, strong=False).items())
    strong = tuple(row(*rung, "strong") for rung in ladder(recipe, counts, strong=True).items())
    return Scaling(recipe, weak, strong)


def _compiled_in_place_of(recipe: Recipe) -> Recipe:
    """A recipe whose step is the same but for the number of its replicas: as few as are compiled."""
    data, count = recipe.parallel.data, recipe.hardware.count
    if data <= REPLICAS or count * REPLICAS % data:
        return recipe
    return at_count(recipe, count * REPLICAS // data, strong=False)


def _lines(found: Scaling) -> Iterator[str]:
    unit = found.recipe.hardware.topology
    yield f"scaling, in units of {unit}; efficiency is {found.counted[0]}/s a chip against the fewest units"
    batch = found.recipe.train.global_batch_size
    rows_of = "images" if found.recipe.reads_images else "sequences"
    cost = "chip-hours" if found.recipe.hardware.dollars_per_chip_hour is None else "dollars"
    for rows, text in (
        (found.weak, "weak: the global batch grows with the count"),
        (found.strong, f"strong: the global batch stays at {batch:,} {rows_of}"),
    ):
        yield ""
        yield f"  {text}"
        yield from (f"  {line}" for line in _step_table(rows, found.counted[0]))
        yield ""
        yield from (f"  {line}" for line in _run_table(found, rows, cost))
    yield ""
    yield "  GiB: of a core; waits: of the step, for collectives over data"
    run = f"of the run of {found.counted_in_words} with failures"
    yield f"  goodput, days and {cost}: {run}, with the best checkpoints and spares (below)"
    yield from _goodput_lines(found)


def _goodput_lines(found: Scaling) -> Iterator[str]:
    for name, rows in (("weak", found.weak), ("strong", found.strong)):
        made = [row.goodput for row in rows if row.goodput is not None]
        if not made:
            continue
        yield ""
        yield f"goodput with failures ({name} scaling; a checkpoint is {made[0].state_bytes / 1e9:,.1f} GB)"
        yield from (f"  {line}" for line in _checkpoint_table(made))
    made = [row.goodput for row in found.weak if row.goodput is not None]
    if not made:
        return
    yield "  MTBF: mean time between failures of the job; stall: of the steps, by a checkpoint"
    yield "  interval: the best between checkpoints; every, best: checkpoint.every in steps, the recipe's and the best"
    yield ""
    yield "spare units: the goodput of weak scaling with 0 to 3 of them, and with the best number"
    yield from (f"  {line}" for line in _spares_table(made))
    yield "  down: units out of service, on average; best: as many spares as give most work a rented chip"
    yield "  a chip: that work, against a chip that never waits"
    yield ""
    yield "assumed of many units (replace figures with hardware.parameters)"
    yield from (f"  {text}" for text in found.assumptions)


def _step_table(rows: Sequence[Row], counted: str) -> list[str]:
    cells: list[Sequence[str] | str] = [
        ("units", "chips", "data", "batch", "step", f"{counted}/s", "MFU", "effic.", "bound by")
    ]
    for row in rows:
        if (plan := row.plan) is None:
            cells.append(f"{row.count:5,}  {row.problem}")
            continue
        numbers = (row.count, plan.topology.chips, plan.layout.data, plan.recipe.train.global_batch_size)
        speed = (in_seconds(plan.time.seconds), f"{plan.units_per_second:,.0f}", f"{plan.mfu:.1%}")
        cells.append((*(f"{n:,}" for n in numbers), *speed, f"{efficiency(row, rows):.1%}", plan.time.bound_by))
    return table(cells, ">>>>>>>><")


def _run_table(found: Scaling, rows: Sequence[Row], cost: str) -> list[str]:
    cells = [("units", "step from", "to", "GiB", "waits", "goodput", "days", cost, "")]
    for row in rows:
        plan, one = row.plan, row.goodput
        if plan is None or one is None:
            continue
        price = found.recipe.hardware.dollars_per_chip_hour or 1
        times = (in_seconds(plan.time.low), in_seconds(plan.time.high))
        shares = (f"{plan.memory.total / _GIB:.1f}", f"{row.data_share:.1%}", f"{one.best.goodput:.1%}")
        days = f"{_over(found.days(row), one.best.goodput):,.2f}"
        whole = f"{found.chip_hours(row, failures=True) * price:,.0f}"
        cells.append((f"{row.count:,}", *times, *shares, days, whole, "" if plan.fits else "DOES NOT FIT"))
    return table(cells, ">>>>>>>><")


def _checkpoint_table(made: Sequence[Goodput]) -> list[str]:
    heads = ("units", "MTBF", "restart", "stall", "interval", "every", "goodput", "best", "goodput")
    cells = [
        (
            f"{one.count:,}",
            in_any_unit(one.mtbf_seconds),
            in_any_unit(one.restart_seconds),
            in_seconds(one.copy_seconds),
            in_any_unit(one.daly_interval_seconds),
            f"{one.checkpoint_every:,}" if one.checkpoint_every else "end",
            f"{one.goodput_at_checkpoint_every:.1%}",
            f"{one.suggested_checkpoint_every:,}",
            f"{one.goodput_at_suggested:.1%}",
        )
        for one in made
    ]
    return table([heads, *cells], ">" * 9)


def _spares_table(made: Sequence[Goodput]) -> list[str]:
    heads = ("units", "down", "0", "1", "2", "3", "one buys", "best", "goodput", "a chip")
    cells = [
        (
            *(f"{one.count:,}", f"{one.units_down:.2f}", *(f"{option.goodput:.1%}" for option in one.spares[:4])),
            f"+{one.first_spare:.1%}" if one.first_spare < 10 else f"{one.first_spare + 1:,.0f}x",
            *(f"{one.best.spares:,}", f"{one.best.goodput:.1%}", f"{one.best.goodput_per_rented_chip:.1%}"),
        )
        for one in made
    ]
    return table([heads, *cells], ">" * 10)


def _over(time: float, goodput: float) -> float:
    return time / goodput if goodput else math.inf
