"""Every layout and program that a recipe could be instead, legal or not, estimated by formula."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from trainfw import backends
from trainfw.errors import UserError, did_you_mean
from trainfw.hardware import Topology
from trainfw.models import limits_of
from trainfw.optim import traits_of
from trainfw.parallel import AXES, Layout, Placement, Sharded, context_problem, layers_problem, place
from trainfw.planning.predict.closed_form import Estimate, estimate, model_shapes, state_bytes
from trainfw.planning.read_step.analysis import check_rates, simulated_recipe
from trainfw.recipe import Recipe, layout_problems

OBJECTIVES = ("time", "cost", "memory")
"""Measures that a search makes small: the step time, the run's cost (on one hardware, so in the same order),
or the memory of a core."""

REMAT: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")
COMPILED = 6
"""Candidates that are compiled, beside the recipe itself."""
MOST_STAGES = 8
POWERS = (2, 4, 8, 16, 32)
LONG = 32_768
"""Tokens of a sequence from which on splitting it is tried."""
MARGIN = 1.15
"""An estimate of memory up to this multiple of a core's may still fit once it is compiled."""

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    recipe: Recipe
    layout: Layout
    estimate: Estimate

    def __str__(self) -> str:
        train = self.recipe.train
        layers = "scanned" if train.scan_layers else "unrolled"
        parts = f"{train.accumulation_steps} microbatch{'es' * (train.accumulation_steps > 1)}"
        sharded = self.recipe.parallel.fsdp_shards
        shards = f", fsdp shards {sharded}" if self.layout.fsdp > 1 and sharded != "parameters" else ""
        return f"{self.layout}{shards}, {parts}, remat {train.remat}, {layers}"


@dataclass(frozen=True)
class Survey:
    """All candidates, estimated."""

    recipe: Recipe
    objective: str
    topology: Topology
    candidates: tuple[Candidate, ...]
    """Legal ones that can be compiled and may fit, the best by estimate first."""
    own: Candidate | None
    """The recipe itself; None where it is illegal."""
    own_problem: str
    dropped: Counter[str]
    """Reason -> how many layouts cannot be."""
    too_large: int
    seconds: float
    """Seconds that the analytic pass took."""

    def __repr__(self) -> str:
        return f"<Survey: {self.recipe.name} on {self.topology.in_words}, {self.legal:,} layouts that are legal>"

    @property
    def legal(self) -> int:
        """Candidates before any was dropped for its size."""
        return len(self.candidates) + self.too_large

    @property
    def simulated_cores(self) -> int:
        """Devices that a process must simulate to compile any of them."""
        layouts = [c.layout for c in (*self.candidates, *([self.own] if self.own else []))]
        return max((_devices(self.recipe, layout) for layout in layouts), default=1)

    def chosen(self, most: int = COMPILED) -> list[Candidate]:
        """List those to compile: the best by the objective, and a third of them for the other end of the Pareto set.

        Unrolled ones are left to `search`: scanned, the same program compiles in a fraction of the time.
        """
        program = scanned(self.candidates)
        front = pareto(program, lambda c: (c.estimate.seconds, c.estimate.memory))
        best = program[: most - most // 3]
        others = [c for c in front if c not in best]
        others.sort(key=lambda c: objective_key(self.objective, c.estimate.seconds, c.estimate.memory))
        chosen = [*best, *others[: most - len(best)]]
        rest = (c for c in program if c not in chosen)
        return [*chosen, *itertools.islice(rest, most - len(chosen))]


def survey(recipe: Recipe, objective: str = "time") -> Survey:
    """Every candidate for `recipe`, estimated; imports no JAX.

    Raises UserError for an unknown objective, and where the recipe names no topology.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"objective = {objective} (--objective): unknown{did_you_mean(objective, OBJECTIVES)}")
    topology = recipe.hardware.load()
    if topology is None:
        raise recipe.error("hardware.topology", "a search needs hardware to be for; see trainfw topology")
    model_shapes(recipe)  # or there is nothing to estimate by
    if recipe.objective.name != "next_token":
        raise recipe.error("objective.name", "a search knows what next_token takes alone; plan the recipe without one")
    check_rates(recipe, topology)
    started, dropped, candidates = time.monotonic(), Counter[str](), []
    for layout in layouts(topology.cores, recipe):
        try:
            placement = _legal(recipe, topology, layout)
        except UserError as error:
            dropped[str(error).partition(":")[0]] += 1
            continue
        if _too_large(recipe, layout):
            dropped[f"not compiled: needs more than the {backends.MAX_SIMULATED:,} devices that are simulated"] += 1
            continue
        for changed in _programs(recipe, topology, layout):
            candidates.append(Candidate(changed, layout, estimate(changed, placement)))
    candidates.sort(key=lambda c: (*objective_key(objective, c.estimate.seconds, c.estimate.memory), str(c)))
    kept = [candidate for candidate in candidates if candidate.estimate.memory <= _room(topology)]
    if not kept:  # The compiler may know better.
        kept = sorted(candidates, key=lambda c: c.estimate.memory)[:COMPILED]
    own, problem = _own(recipe, topology)
    return Survey(
        recipe=recipe,
        objective=objective,
        topology=topology,
        candidates=tuple(kept),
        own=own,
        own_problem=problem,
        dropped=dropped,
        too_large=len(candidates) - len(kept),
        seconds=time.monotonic() - started,
    )


def layouts(cores: int, recipe: Recipe) -> Iterator[Layout]:
    """Every way to divide `cores` among data, fsdp and tensor, with every one of `_others`."""
    for pipeline, expert, context in itertools.product(*_others(recipe).values()):
        left, rest = divmod(cores, pipeline * expert * context)
        for tensor in _divisors(left) if not rest else ():
            for fsdp in _divisors(left // tensor):
                yield Layout(pipeline, left // tensor // fsdp, fsdp, expert, context, tensor)


def _others(recipe: Recipe) -> dict[str, list[int]]:
    """Sizes of the other axes that are tried: the recipe's own, one, and where they may pay the usual ones.

    Stages of a pipeline where there is a slower network between units of the hardware, a whole number of units each;
    context for long sequences; expert for mixtures.
    """
    model, length = recipe.model, recipe.sequence_length
    chunks, period, units = recipe.parallel.interleave, model.layer_period, recipe.hardware.count
    experts = [limit.size for limit in limits_of(model) if limit.dim == "experts"]
    stages = [n for n in _divisors(units) if n <= MOST_STAGES]
    tried = {
        "pipeline": [n for n in stages if not layers_problem(model.num_layers, n, chunks, period)],
        "expert": [n for n in POWERS if experts and all(size % n == 0 for size in experts)],
        "context": [n for n in POWERS if length >= LONG and not context_problem(length, n, 1)],
    }
    return {axis: sorted({1, max(getattr(recipe.parallel, axis), 1), *sizes}) for axis, sizes in tried.items()}


def _programs(recipe: Recipe, topology: Topology, layout: Layout) -> Iterator[Recipe]:
    """The recipe in this layout with everything else that is searched.

    Parameters are left whole only where they, and the share of the optimizer's state, are less than a core holds.
    """
    period = recipe.model.layer_period
    forms = (True, False) if recipe.model.num_layers // period > 1 else (True,)
    for parts in _divisors(recipe.train.global_batch_size // layout.batch_shards):
        if any(layout_problems(recipe, layout, parts)):  # its microbatches may not be those of a pipeline
            continue
        for remat, scan, parallel in itertools.product(REMAT, forms, _shards(recipe, topology, layout)):
            train = {"accumulation_steps": parts, "remat": remat, "scan_layers": scan}
            yield _changed(recipe, layout, train, parallel)


def _shards(recipe: Recipe, topology: Topology, layout: Layout) -> Iterator[dict[str, object]]:
    if layout.fsdp == 1:  # nothing is split
        yield {}
        return
    for shards in get_args(Sharded):
        changed = _changed(recipe, layout, {}, {"fsdp_shards": shards})
        if shards == "parameters" or sum(state_bytes(changed, layout).values()) <= _room(topology):
            yield {"fsdp_shards": shards}


def _room(topology: Topology) -> float:
    return math.inf if topology.hbm_size is None else topology.hbm_size * MARGIN


def _changed(recipe: Recipe, layout: Layout, train: dict[str, Any], parallel: dict[str, Any]) -> Recipe:
    if layout.pipeline == 1:  # these are of a pipeline alone
        parallel = {"interleave": 1, "pipeline_microbatches": None, **parallel}
    changed = {
        "parallel": recipe.parallel.model_copy(update={**layout.sizes, **parallel}),
        "train": recipe.train.model_copy(update=train),
    }
    return recipe.model_copy(update=changed)


def _own(recipe: Recipe, topology: Topology) -> tuple[Candidate | None, str]:
    """The recipe as it is, or why it cannot be."""
    try:
        with recipe.blamed("parallel"):
            layout = Layout.resolve(recipe.parallel, topology.cores)
        placement = _legal(recipe, topology, layout, own=True)
    except UserError as error:
        return None, str(error)
    if _too_large(recipe, layout):
        return None, f"needs more than the {backends.MAX_SIMULATED:,} devices that are simulated"
    changed = _changed(recipe, layout, {}, {})
    return Candidate(changed, layout, estimate(changed, placement)), ""


def _legal(recipe: Recipe, topology: Topology, layout: Layout, *, own: bool = False) -> Placement:
    """Place `layout` on the hardware. Raises UserError saying why it cannot be; the reason is before the first colon.

    `own` says that the rest of the recipe is to stay as it is.
    """
    for problem in layout_problems(recipe, layout, None if own else 1):
        raise UserError(f"{problem.reason}: {layout}: {problem.text}")
    try:
        placement = place(topology, layout, recipe.parallel.traffic)
    except UserError as error:
        raise UserError(f"no order of the cores gives every axis groups that are allowed: {error}") from None
    if not placement.hosts_read_shares:
        raise UserError(f"a host's part of the batch is not one share of it: {layout}")
    return placement


def _devices(recipe: Recipe, layout: Layout) -> int:
    return math.prod(simulated_recipe(recipe, layout)[1].sizes.values())


def _too_large(recipe: Recipe, layout: Layout) -> bool:
    """Tell whether no program that can be compiled here tells of it (see `simulation`)."""
    shortened = simulated_recipe(recipe, layout)[1].fsdp != layout.fsdp
    return _devices(recipe, layout) > backends.MAX_SIMULATED or (
        shortened and traits_of(recipe.optimizer).whole_matrices
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def pareto(items: Iterable[T], of: Callable[[T], tuple[float, float]]) -> list[T]:
    """List the items that no other equals in both values and beats in one, in their order; of equals the first."""
    kept: list[T] = []
    for item in sorted(items, key=of):  # stable
        if not kept or of(item)[1] < of(kept[-1])[1]:
            kept.append(item)
    return kept


def settings(recipe: Recipe) -> dict[str, object]:
    """Return the values that a search may change, by dotted key."""
    keys = {
        "parallel": (*AXES, "interleave", "pipeline_microbatches", "fsdp_shards"),
        "train": ("accumulation_steps", "remat", "scan_layers"),
    }
    return {f"{name}.{key}": getattr(getattr(recipe, name), key) for name, found in keys.items() for key in found}


def scanned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One of each pair that differs in the form of the stack: the scanned."""
    return [candidate for candidate in candidates if candidate.recipe.train.scan_layers]


def same_but_stack(one: Candidate, other: Candidate) -> bool:
    ignored = {"train.scan_layers": None}
    return settings(one.recipe) | ignored == settings(other.recipe) | ignored


def objective_key(objective: str, seconds: float, memory: float) -> tuple[float, float]:
    return (memory, seconds) if objective == "memory" else (seconds, memory)
