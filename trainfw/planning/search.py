"""The search for a layout: an analytic pass over all that are legal, and the compiler over the best few.

Searched are data, fsdp and tensor over all of the recipe's cores, how many microbatches a step is split into, what
the backward pass computes again, and whether layers are scanned. The batch, the data and the hardware stay.

The analytic pass (`estimate`) compiles nothing and imports no JAX. It writes down the matrix products and collectives
of the step in closed form, as the program's shardings imply them, and times them as a plan is timed. State is exact.
Activations follow from the remat policy. What else passes through memory, and what else is held, are multiples of
those arrays that were read from compiled plans of Llama 3.1 70B on 1,024 cores (data 1 and 4, tensor 1 to 8, each
remat policy). Scanned or unrolled is the same time to it, so the unrolled form of the best is compiled as well, where
there is time. It only says which candidates are worth compiling: what is ranked in the end, and reported, are plans.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import yaml

from trainfw import backends
from trainfw.errors import UserError, did_you_mean
from trainfw.hardware import Topology
from trainfw.models import ModelConfig
from trainfw.parallel import Layout, Placement, place
from trainfw.planning.analysis import Analysis, Matmul, Transfer, simulated_recipe
from trainfw.planning.plan import Plan, plan
from trainfw.planning.time import step_time
from trainfw.recipe import Recipe, find_recipe, load_recipe

OBJECTIVES = ("time", "cost", "memory")
"""What is made small: the step time, what the run costs (of the recipe's hardware, so in the order of the step time),
or the memory of a core."""

REMAT: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")
COMPILED = 6
"""Candidates that are compiled, beside the recipe itself."""
LIMIT = 200.0
"""Seconds after which no further candidate is compiled."""
MARGIN = 1.15
"""An estimate of memory up to this multiple of a core's may still fit once it is compiled."""

_UNROLLED = 1 / 6
"""Seconds that an unrolled layer takes to compile per second of the scanned program (Llama 3.1 8B on 256 cores: 0.16),
by which the unrolled form of the winner is tried only where there is time for it."""
_MOVED = {"none": (120.0, 72.0), "dots": (59.0, 34.0), "full": (56.0, 24.0)}
"""Times that elementwise operations of a layer move an activation as wide as the model, and one as wide as its
feed-forward layer and heads. (`none` by one compiled plan, the others by several.)"""
_MOVED_SCORES = {"none": 16.0, "dots": 14.3, "full": 14.3}
"""Times that the scores pass through memory, in f32."""
_MOVED_WEIGHTS = 75.0
"""Times that a microbatch moves a core's share of the parameters, in f32."""
_HELD_SCORES = 3.0
"""Scores, f32, that one layer's backward pass holds at once."""
_HELD_LOGITS = 3.0
_HELD_STATE = 3.6
"""Gradients, their sums and the update's temporaries, in multiples of the parameters."""
_HELD_TABLES = 2.9
"""Embedding tables, whole along fsdp, f32."""

T = TypeVar("T")
Weight: TypeAlias = tuple[str, tuple[int, ...], int]
"""Kind, shape with layers first where there are any, and how it is split: 2 over fsdp and tensor, 1 over tensor, 0."""


@dataclass(frozen=True)
class Estimate:
    """What the analytic pass says of a candidate."""

    seconds: float
    """Of a step."""
    memory: int
    """Bytes of a core."""


@dataclass(frozen=True)
class Candidate:
    recipe: Recipe
    """The recipe with the candidate's settings."""
    layout: Layout
    estimate: Estimate

    def __str__(self) -> str:
        train = self.recipe.train
        layers = "scanned" if train.scan_layers else "unrolled"
        parts = f"{train.accumulation_steps} microbatch{'es' * (train.accumulation_steps > 1)}"
        return f"{self.layout}, {parts}, remat {train.remat}, {layers}"


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
    """Candidates estimated not to fit."""
    seconds: float
    """That the analytic pass took."""

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
        """Those to compile: the best by the objective, and a third of them for the other end of the Pareto set.

        Unrolled ones are left to `search`: scanned, the same program compiles in a fraction of the time.
        """
        scanned = _scanned(self.candidates)
        front = pareto(scanned, lambda c: (c.estimate.seconds, c.estimate.memory))
        best = scanned[: most - most // 3]
        others = sorted((c for c in front if c not in best), key=lambda c: self.key(c.estimate))
        chosen = [*best, *others[: most - len(best)]]
        rest = (c for c in scanned if c not in chosen)
        return [*chosen, *itertools.islice(rest, most - len(chosen))]

    def key(self, found: Estimate) -> tuple[float, float]:
        return _key(self.objective, found.seconds, found.memory)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    survey: Survey
    own: Plan | None
    """The recipe as it is; None where it cannot be planned."""
    plans: tuple[tuple[Candidate, Plan], ...]
    """Compiled, the recipe itself among them, the best by the objective first; whether they fit or not."""
    refused: Counter[str]
    """Reason -> how many could not be built after all."""
    skipped: int
    """Not compiled, because they were estimated to need no less than one that did not fit."""
    out_of_time: int
    """Of those that were to be compiled."""

    @property
    def fitting(self) -> list[tuple[Candidate, Plan]]:
        return [(candidate, made) for candidate, made in self.plans if _fits(made)]

    @property
    def winner(self) -> tuple[Candidate, Plan] | None:
        """The best that fits."""
        return next(iter(self.fitting), None)

    @property
    def pareto(self) -> list[tuple[Candidate, Plan]]:
        """Those that fit, of which no other is both as fast and as small, the fastest first."""
        front = pareto(self.fitting, lambda pair: (pair[1].time.seconds, pair[1].memory.total))
        return sorted(front, key=lambda pair: pair[1].time.seconds)

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return {
            "objective": self.survey.objective,
            "candidates": self.survey.legal,
            "dropped_layouts": dict(self.survey.dropped),
            "estimated_not_to_fit": self.survey.too_large,
            "winner": self.winner[1].to_json() if self.winner else None,
            "recipe": self.own.to_json() if self.own else None,
            "compiled": [
                {
                    "settings": settings(candidate.recipe),
                    "step_time_seconds": made.time.seconds,
                    "memory_bytes_per_core": made.memory.total,
                    "fits": _fits(made),
                    "estimated_step_time_seconds": candidate.estimate.seconds,
                    "estimated_memory_bytes_per_core": candidate.estimate.memory,
                }
                for candidate, made in self.plans
            ],
            "pareto": [settings(candidate.recipe) for candidate, _ in self.pareto],
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


# The analytic pass ------------------------------------------------------------------------------------------------


def survey(recipe: Recipe, objective: str = "time") -> Survey:
    """Every candidate for `recipe`, estimated; imports no JAX.

    Raises UserError for an unknown objective, and where the recipe names no topology.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"--objective {objective}: unknown{did_you_mean(objective, OBJECTIVES)}")
    topology = recipe.hardware.load()
    if topology is None:
        raise recipe.error("hardware.topology", "a search needs hardware to be for; see trainfw topology")
    started = time.monotonic()
    dropped: Counter[str] = Counter()
    candidates = []
    for layout in layouts(topology.cores):
        try:
            placement = _legal(recipe, topology, layout)
        except UserError as error:
            dropped[_reason(error)] += 1
            continue
        if _devices(recipe, layout) > backends.MAX_SIMULATED or simulated_recipe(recipe, layout)[1].fsdp != layout.fsdp:
            dropped[f"not compiled: needs more than the {backends.MAX_SIMULATED:,} devices that are simulated"] += 1
            continue
        for changed in _programs(recipe, layout):
            candidates.append(Candidate(changed, layout, estimate(changed, placement)))
    candidates.sort(key=lambda c: (*_key(objective, c.estimate.seconds, c.estimate.memory), str(c)))
    room = math.inf if topology.hbm_size is None else topology.hbm_size * MARGIN
    kept = [candidate for candidate in candidates if candidate.estimate.memory <= room]
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


def layouts(cores: int) -> Iterator[Layout]:
    """Every way to divide `cores` among data, fsdp and tensor."""
    for tensor in _divisors(cores):
        for fsdp in _divisors(cores // tensor):
            yield Layout(data=cores // tensor // fsdp, fsdp=fsdp, tensor=tensor)


def estimate(recipe: Recipe, placement: Placement) -> Estimate:
    """Time and memory of a step of `recipe` in the layout of `placement`, without compiling it."""
    seconds = step_time(closed_analysis(recipe, placement.layout), placement, recipe).seconds
    return Estimate(seconds, sum(closed_memory(recipe, placement.layout, placement.topology).values()))


def closed_analysis(recipe: Recipe, layout: Layout) -> Analysis:
    """What one core computes and moves in a step, in closed form: `analyse` without a compiler."""
    model, train = recipe.model, recipe.train
    length, tensor, parts = recipe.data.sequence_length, layout.tensor, train.accumulation_steps
    rows = train.global_batch_size // layout.batch_shards // parts
    tokens, runs, again = rows * length, model.num_layers * parts, train.remat != "none"
    dtype, narrow = ("bf16", 2) if train.compute_dtype == "bfloat16" else ("f32", 4)
    width, vocabulary = model.hidden_size, model.vocab_size // tensor
    heads, kv_heads = model.num_heads // tensor, model.num_kv_heads // tensor
    wide = [heads * model.head_dim, *2 * [kv_heads * model.head_dim], *2 * [model.intermediate_size // tensor]]
    down = [model.intermediate_size // tensor, heads * model.head_dim]

    def product(
        m: int, n: int, k: int, times: int, *, out: int = narrow, size: int = narrow, name: str = dtype
    ) -> None:
        matmuls.append(Matmul(1, m, n, k, name, times, bytes=size * (m * k + k * n) + out * m * n))

    matmuls: list[Matmul] = []
    for out in wide:
        product(tokens, out, width, runs * (2 if train.remat == "full" else 1))
        product(tokens, width, out, runs)
        product(width, out, tokens, runs)
    for index, inner in enumerate(down):  # what the feed-forward layer returns is never needed again
        product(tokens, width, inner, runs * (2 if train.remat == "full" and index else 1))
        product(tokens, inner, width, runs)
        product(inner, width, tokens, runs)
    product(tokens, vocabulary, width, parts, out=4)
    product(tokens, width, vocabulary, parts, out=4, size=4)
    product(vocabulary, width, tokens, parts, out=4, size=4)
    every, head, scores = heads // kv_heads * length, model.head_dim, heads * rows * length * length
    ends = rows * (heads + kv_heads) * length * head
    for m, n, k, times, score_size, end_size, backward in (
        (length, every, head, runs * (1 + again), 4, narrow, False),
        (head, every, length, runs * (1 + again), narrow, narrow, False),
        (head, length, every, runs, narrow, narrow, True),
        (every, length, head, runs, narrow, narrow, True),
        (length, head, every, runs, 4, 4, True),
        (every, head, length, runs, 4, 4, True),
    ):
        size, name = scores * score_size + ends * end_size, "f32" if end_size == 4 else dtype
        batch = rows * kv_heads
        matmuls.append(Matmul(batch, m, n, k, name, times, bytes=size, attention=True, backward=backward))
    share = sum(_elements(w) / _parts(w, layout) for w in weights(model)) * 4
    once, beside = _MOVED[train.remat]
    moved = narrow * tokens * (once * width + beside * (wide[0] + wide[1] + wide[3]))
    attention = _MOVED_SCORES[train.remat] * scores * 4.0 * runs
    update = share * (10.5 + 4.4 * parts)
    return Analysis(
        layout=layout,
        matmuls=tuple(matmuls),
        transfers=tuple(_transfers(recipe, layout, tokens, narrow, dtype)),
        streamed_bytes=moved * runs + _MOVED_WEIGHTS * share * parts + attention + update,
        attention_bytes=attention,
        update_bytes=update,
    )


def _transfers(recipe: Recipe, layout: Layout, tokens: int, narrow: int, dtype: str) -> Iterator[Transfer]:
    """The collectives of a step: weights gathered over fsdp in every microbatch (and again for what remat computes
    again), gradients scattered over it and summed over data, activations summed over tensor."""
    model, train = recipe.model, recipe.train
    parts, width = train.accumulation_steps, model.hidden_size
    runs, again = model.num_layers * parts, train.remat != "none"
    batch = tuple(axis for axis in ("data", "fsdp") if layout.sizes[axis] > 1)
    for _, shape, _ in (w for w in weights(model) if len(w[1]) == 3):
        size = narrow * shape[1] * shape[2] // layout.tensor
        if layout.fsdp > 1:
            yield Transfer("all-gather", ("fsdp",), dtype, size, runs * (1 + again))
            yield Transfer("reduce-scatter", ("fsdp",), dtype, size, runs)
        if layout.data > 1:
            yield Transfer("all-reduce", ("data",), dtype, size // layout.fsdp, runs)
    table = 4 * model.vocab_size * width // layout.tensor
    if layout.fsdp > 1:
        yield Transfer("all-gather", ("fsdp",), "f32", table, parts)
        yield Transfer("all-gather", ("fsdp",), dtype, table * narrow // 4, parts)
        yield Transfer("reduce-scatter", ("fsdp",), "f32", table, parts)
    if layout.data > 1:
        yield Transfer("all-reduce", ("data",), "f32", table // layout.fsdp, parts)
    if batch == ("fsdp",):
        yield Transfer("reduce-scatter", batch, "f32", table, parts)
    elif batch:  # of the lookup: summed whole
        yield Transfer("all-reduce", batch, "f32", table, parts)
    if batch:
        yield Transfer("all-reduce", batch, "f32", 4 * width, 2 * runs + parts)
    if layout.tensor > 1:
        yield Transfer("all-reduce", ("tensor",), dtype, narrow * tokens * width, runs * (7 + (train.remat == "full")))
        yield Transfer("all-reduce", ("tensor",), "f32", 4 * tokens * width, 2 * parts)


def closed_memory(recipe: Recipe, layout: Layout, topology: Topology) -> dict[str, int]:
    """Bytes on one core in closed form: state exactly, the rest by formula."""
    model, train = recipe.model, recipe.train
    length, tensor, layers = recipe.data.sequence_length, layout.tensor, model.num_layers
    mine = train.global_batch_size // layout.batch_shards
    rows, narrow = mine // train.accumulation_steps, 2 if train.compute_dtype == "bfloat16" else 4
    tokens, width = rows * length, model.hidden_size
    heads = (model.num_heads * model.head_dim) // tensor
    both = heads + 2 * model.num_kv_heads * model.head_dim // tensor
    forward = model.intermediate_size // tensor
    scores = rows * (model.num_heads // tensor) * length * length
    parameters = state_bytes(recipe, layout)["parameters"]
    # The residual stream is split over tensor where the rules say so.
    stream = width // tensor if recipe.parallel.rules.get("act_embed") == ["tensor"] else width
    saved: float = narrow * tokens * stream
    if train.remat == "dots":
        saved = narrow * tokens * (2 * stream + 2 * forward + both)
    elif train.remat == "none":
        saved = narrow * tokens * (10 * width + 5 * forward + 4 * both) + scores * (4 + narrow)
    layer = _HELD_SCORES * 4 * scores + narrow * tokens * (3 * width + 1.5 * forward)
    logits = _HELD_LOGITS * 4 * tokens * (model.vocab_size // tensor)
    gathered = 0.0 if layout.fsdp == 1 else _HELD_TABLES * 4 * model.vocab_size * width / tensor
    if layout.fsdp > 1 and (train.remat == "none" or not train.scan_layers):
        gathered += narrow * sum(_elements(w) for w in weights(model) if len(w[1]) == 3) / tensor
    return {
        **state_bytes(recipe, layout),
        "gradients": round(_HELD_STATE * parameters),
        "activations": round(saved * layers + max(layer, logits)),
        "collective_buffers": round(gathered),
        "data": 5 * 4 * mine * length,
        "runtime": round(topology.core_overhead),
    }


def state_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes of parameters and optimizer state on one core, counters left out, by the default rules of sharding."""
    parameters, optimizer = 0, 0
    for weight in weights(recipe.model):
        elements, parts = _elements(weight), _parts(weight, layout)
        parameters += 4 * elements // parts
        match recipe.optimizer.name:
            case "lion":
                optimizer += 4 * elements // parts
            case "muon" if weight[0] == "layers.kernel":
                optimizer += 4 * elements // parts
            case "adafactor":
                *_, second, first = sorted((1, *weight[1]))
                if len(weight[1]) > 1 and second >= 128:  # a row and a column, on every core
                    optimizer += 4 * (elements // first + elements // second + 1)
                else:
                    optimizer += 4 * (elements // parts + 2)
            case _:
                optimizer += 8 * elements // parts
    return {"parameters": parameters, "optimizer_state": optimizer}


def weights(model: ModelConfig) -> list[Weight]:
    """Every parameter of `model`, as the default rules shard it."""
    width, layers = model.hidden_size, model.num_layers
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    found: list[Weight] = [("table", (model.vocab_size, width), 2)]
    if not model.tie_embeddings:
        found.append(("table", (width, model.vocab_size), 2))
    found += [
        ("layers.kernel", (layers, width, out), 2)
        for out in (heads, kv_heads, kv_heads, *2 * [model.intermediate_size])
    ]
    found += [("layers.kernel", (layers, inner, width), 2) for inner in (heads, model.intermediate_size)]
    if model.qkv_bias:
        found += [("layers.bias", (layers, out), 1) for out in (heads, kv_heads, kv_heads)]
    found += [("layers.scale", (layers, width), 0)] * (4 if model.post_norms else 2)
    if model.qk_norm:
        found += [("layers.scale", (layers, model.head_dim), 0)] * 2
    return [*found, ("scale", (width,), 0)]


def _elements(weight: Weight) -> int:
    return math.prod(weight[1])


def _parts(weight: Weight, layout: Layout) -> int:
    return (1, layout.tensor, layout.fsdp * layout.tensor)[weight[2]]


def _programs(recipe: Recipe, layout: Layout) -> Iterator[Recipe]:
    """The recipe in this layout with every number of microbatches, remat policy and form of the stack."""
    period = len(recipe.model.layer_pattern)
    forms = (True, False) if recipe.model.num_layers // period > 1 else (True,)
    for parts in _divisors(recipe.train.global_batch_size // layout.batch_shards):
        for remat in REMAT:
            for scan in forms:
                yield _changed(recipe, layout, accumulation_steps=parts, remat=remat, scan_layers=scan)


def _changed(recipe: Recipe, layout: Layout, **train: Any) -> Recipe:
    parallel = recipe.parallel.model_copy(update=layout.sizes)
    return recipe.model_copy(update={"parallel": parallel, "train": recipe.train.model_copy(update=train)})


def _own(recipe: Recipe, topology: Topology) -> tuple[Candidate | None, str]:
    """The recipe as it is, or why it cannot be."""
    try:
        with recipe.blamed("parallel"):
            layout = Layout.resolve(recipe.parallel, topology.cores)
        placement = _legal(recipe, topology, layout, recipe.train.accumulation_steps)
    except UserError as error:
        return None, str(error)
    if _devices(recipe, layout) > backends.MAX_SIMULATED or simulated_recipe(recipe, layout)[1].fsdp != layout.fsdp:
        return None, f"needs more than the {backends.MAX_SIMULATED:,} devices that are simulated"
    changed = _changed(recipe, layout)
    return Candidate(changed, layout, estimate(changed, placement)), ""


def _legal(recipe: Recipe, topology: Topology, layout: Layout, parts: int = 1) -> Placement:
    """Where `layout` lies. Raises UserError saying why it cannot be; the reason is before the first colon."""
    model, rows = recipe.model, recipe.train.global_batch_size
    for axis in ("pipeline", "expert", "context"):
        if layout.sizes[axis] > 1:
            raise UserError(f"parallel.{axis} is not searched, and not built yet: {axis}({layout.sizes[axis]})")
    split = [("num_heads", "tensor"), ("num_kv_heads", "tensor")]
    # These are as the default rules have it; others are judged when it is built.
    default = {
        "vocab": ("vocab_size", "tensor"),
        "mlp": ("intermediate_size", "tensor"),
        "embed": ("hidden_size", "fsdp"),
    }
    split += [pair for name, pair in default.items() if name not in recipe.parallel.rules]
    if recipe.parallel.rules.get("act_embed") == ["tensor"]:
        split.append(("hidden_size", "tensor"))
    for field, axis in split:
        if getattr(model, field) % layout.sizes[axis]:
            raise UserError(f"model.{field} = {getattr(model, field):,} does not divide over {axis}: {layout}")
    if rows % (layout.batch_shards * parts):
        times = f" * accumulation_steps({parts})" if parts > 1 else ""
        raise UserError(f"train.global_batch_size = {rows:,} does not divide over data * fsdp{times}: {layout}")
    try:
        placement = place(topology, layout, recipe.parallel.traffic)
    except UserError as error:
        raise UserError(f"no order of the cores gives every axis groups that are allowed: {error}") from None
    if not _hosts_read_shares(placement):
        raise UserError(f"a host's part of the batch is not one share of it: {layout}")
    return placement


def _hosts_read_shares(placement: Placement) -> bool:
    """Whether the rows of every host (instance) are one of equal, contiguous shares of the batch."""
    import numpy as np

    layout, topology = placement.layout, placement.topology
    hosts = placement.order // topology.cores_per_instance
    shares = np.broadcast_to(np.arange(layout.batch_shards).reshape(1, layout.data, layout.fsdp, 1, 1, 1), hosts.shape)
    for host in range(topology.instances):
        mine = np.unique(shares[hosts == host])
        if mine[-1] - mine[0] + 1 != len(mine) or layout.batch_shards % len(mine) or mine[0] % len(mine):
            return False
    return True


def _reason(error: UserError) -> str:
    return str(error).partition(":")[0]


def _devices(recipe: Recipe, layout: Layout) -> int:
    """That are simulated to compile it."""
    return math.prod(simulated_recipe(recipe, layout)[1].sizes.values())


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# The compiler -----------------------------------------------------------------------------------------------------


def search(
    survey: Survey,
    progress: Callable[[str], None] = lambda _: None,
    *,
    most: int = COMPILED,
    limit: float = LIMIT,
) -> Found:
    """Plan the best of `survey`, on simulated devices that this process has (see `Survey.simulated_cores`).

    Args:
        progress: told what is being done.
        most: candidates to compile, beside the recipe itself; where none of them fits, more until one does.
        limit: seconds after which no further one is begun. (The recipe itself always is.)
    """
    started = time.monotonic()
    plans: list[tuple[Candidate, Plan]] = []
    refused: Counter[str] = Counter()
    took: dict[bool, float] = {}
    skipped = late = 0

    def compiled(candidate: Candidate) -> Plan | None:
        begun = time.monotonic()
        progress(f"compiling {candidate} (about {candidate.estimate.seconds:.3g} s a step by formula)")
        try:
            made = plan(candidate.recipe)
        except UserError as error:
            refused[str(error)] += 1
            return None
        scan = candidate.recipe.train.scan_layers
        took[scan] = max(took.get(scan, 0.0), time.monotonic() - begun)
        plans.append((candidate, made))
        fits = "" if _fits(made) else ", does not fit"
        progress(f"  {made.time.seconds:.3g} s a step, {made.memory.total / 2**30:.1f} GiB a core{fits}")
        return made

    def hopeless(candidate: Candidate) -> bool:
        return any(
            not _fits(made)
            and other.recipe.train.remat == candidate.recipe.train.remat
            and other.recipe.train.scan_layers == candidate.recipe.train.scan_layers
            and other.estimate.memory <= candidate.estimate.memory
            for other, made in plans
        )

    own = compiled(survey.own) if survey.own is not None else None
    chosen = survey.chosen(most)
    rest = [candidate for candidate in _scanned(survey.candidates) if candidate not in chosen]
    for number, candidate in enumerate([*chosen, *rest]):
        if number >= len(chosen) and any(_fits(made) for _, made in plans if made is not own):
            break
        if survey.own is not None and candidate.recipe == survey.own.recipe:
            continue
        if time.monotonic() - started + took.get(True, 0.0) > limit:
            late = max(0, len(chosen) - number)
            break
        if hopeless(candidate):
            skipped += 1
            continue
        compiled(candidate)

    plans.sort(key=lambda pair: _key(survey.objective, pair[1].time.seconds, pair[1].memory.total))
    best = next((candidate for candidate, made in plans if _fits(made)), None)
    if best is not None and best.recipe.train.scan_layers:
        twin = next((c for c in survey.candidates if _same_but_stack(c, best) and not c.recipe.train.scan_layers), None)
        wait = took.get(True, 0.0) * survey.recipe.model.num_layers * _UNROLLED
        if twin is not None and all(twin.recipe != other.recipe for other, _ in plans):
            if time.monotonic() - started + wait <= limit:
                compiled(twin)
            else:
                late += 1
    plans.sort(key=lambda pair: _key(survey.objective, pair[1].time.seconds, pair[1].memory.total))
    return Found(survey, own, tuple(plans), refused, skipped, late)


def pareto(items: Iterable[T], of: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those of which no other is as good in both values and better in one; of equals the first."""
    kept: list[T] = []
    least = math.inf
    for item in sorted(items, key=of):  # stable
        if of(item)[1] < least:
            kept.append(item)
            least = of(item)[1]
    return kept


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a search may change, by dotted key."""
    parallel, train = recipe.parallel, recipe.train
    return {
        **{f"parallel.{axis}": getattr(parallel, axis) for axis in ("data", "fsdp", "tensor")},
        "train.accumulation_steps": train.accumulation_steps,
        "train.remat": train.remat,
        "train.scan_layers": train.scan_layers,
    }


def _scanned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One of each pair that differs in the form of the stack: the scanned."""
    return [candidate for candidate in candidates if candidate.recipe.train.scan_layers]


def _same_but_stack(one: Candidate, other: Candidate) -> bool:
    ignored = {"train.scan_layers": None}
    return settings(one.recipe) | ignored == settings(other.recipe) | ignored


def _fits(made: Plan) -> bool:
    return made.memory.headroom is None or made.memory.headroom >= 0


def _key(objective: str, seconds: float, memory: float) -> tuple[float, float]:
    return (memory, seconds) if objective == "memory" else (seconds, memory)


# What is written and said -----------------------------------------------------------------------------------------


def default_out(recipe: Recipe) -> Path:
    """Where the winner is written when nothing is said."""
    return Path(f"{recipe.name}-planned.yaml")


def check_out(file: Path, source: str | os.PathLike[str], *, named: bool) -> None:
    """Raises UserError where the winner cannot go to `file`: before the search, not after it.

    Args:
        source: the recipe that it is to extend.
        named: whether the user named `file`; else it must not be there yet.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--out {file}: expected a file in a directory that exists")
    if file.exists() and file.samefile(find_recipe(source)):
        raise UserError(f"--out {file}: is the recipe itself, which the one to write extends; name another file")
    if file.exists() and not named:
        raise UserError(f"{file}: already there; name it with --out {file} to replace it, or name another")


def write_winner(found: Found, source: str | os.PathLike[str], file: Path) -> None:
    """Write the winner to `file`, as a recipe that extends `source` (a path, or the name of a bundled recipe).

    What overrides said is in it too. Where an extension cannot say it (it merges sections, and removes nothing), the
    recipe is written in full. Raises UserError where nothing fits, and where the file cannot be written.
    """
    if found.winner is None:
        raise UserError("nothing that was compiled fits in memory: no recipe is written")
    candidate, made = found.winner
    recipe = candidate.recipe.model_copy(update={"name": f"{found.survey.recipe.name}-planned"})
    original, base = load_recipe(source), find_recipe(source).resolve()
    tree: dict[str, Any] = {"extends": _path_from(file, base), "name": recipe.name}
    before, chosen = original.model_dump(), settings(recipe)
    for section, values in recipe.model_dump().items():
        if not isinstance(values, dict):
            continue
        all_of_it = section == "model" and values["preset"] != before["model"]["preset"]
        said = {
            key: value
            for key, value in values.items()
            if all_of_it or value != before[section][key] or f"{section}.{key}" in chosen
        }
        if said:
            tree[section] = said
    head = (
        f"# Best by {found.survey.objective} of {len(found.plans)} layouts and programs that were compiled, out of "
        f"{found.survey.legal:,} that are legal: trainfw plan --search\n# Predicted: {made.time.seconds:.3g} s a step, "
        f"{made.memory.total / 2**30:.2f} GiB a core. Nothing was measured on this hardware.\n"
    )
    try:
        file.write_text(head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    try:
        same = load_recipe(file) == recipe
    except UserError:
        same = False
    if not same:
        file.write_text(head + recipe.to_yaml(), encoding="utf-8")


def _path_from(file: Path, base: Path) -> str:
    """`base` as `file` names it: relative where it lies beside or below."""
    here = file.resolve().parent
    return str(base.relative_to(here)) if base.is_relative_to(here) else str(base)


def _lines(found: Found) -> Iterator[str]:
    survey = found.survey
    units = f"{survey.topology.count} x {survey.topology.name}" if survey.topology.count > 1 else survey.topology.name
    yield f"{survey.recipe.name} on {units}: {survey.topology.cores:,} cores, global batch and data as the recipe says"
    yield (
        f"{survey.legal:,} legal candidates (layout, microbatches, remat, stack), "
        f"estimated in {survey.seconds:.1f} s by formula; {len(found.plans)} compiled"
    )
    for reason, times in survey.dropped.most_common():
        yield f"  {times:5,} layouts dropped: {reason}"
    if survey.too_large:
        yield f"  {survey.too_large:5,} candidates dropped: estimated to need more than {MARGIN:.2f} x a core's memory"
    if found.skipped:
        yield f"  {found.skipped:5,} not compiled: estimated to need no less than one that does not fit"
    for reason, times in found.refused.items():
        yield f"  {times:5,} refused when built: {reason}"
    if found.out_of_time:
        yield f"  {found.out_of_time:5,} not compiled for lack of time"
    if survey.own is None:
        yield f"  the recipe as it is cannot be planned: {survey.own_problem}"
    if set(survey.recipe.parallel.rules) - {"act_embed"}:
        yield "  parallel.rules is set: estimates take the default rules"
    yield "A prediction: nothing here was measured on this hardware. (est.: by formula, before compiling)"
    yield ""
    yield f"    {'step':>9} {'est.':>9} {'GiB/core':>9} {'est.':>6}  what it changes"
    front = found.pareto
    rows = [("pareto", pair) for pair in front] + [
        ("", pair) for pair in found.plans if all(pair[1] is not made for _, made in front)
    ]
    for group, pairs in itertools.groupby(rows, key=lambda row: row[0]):
        yield "the Pareto set of step time and memory" if group else "compiled too"
        for _, (candidate, made) in pairs:
            mark = "*" if found.winner is not None and made is found.winner[1] else " "
            size = f"{made.memory.total / 2**30:9.2f} {candidate.estimate.memory / 2**30:6.1f}"
            fits = "" if _fits(made) else "  (does not fit)"
            speed = f"{made.time.seconds:9.4g} {candidate.estimate.seconds:9.4g}"
            yield f"  {mark} {speed} {size}  {_changes(survey, candidate)}{fits}"
    yield ""
    if found.winner is None:
        yield "nothing that was compiled fits in memory: no winner"
        return
    candidate, made = found.winner
    yield f"* best by {survey.objective}: {candidate}"
    if survey.objective == "cost":
        price = "" if made.dollars is None else f", ${made.dollars:,.0f}"
        yield f"  the run: {made.chip_hours:,.0f} chip-hours{price} (hardware stays, so cost follows step time)"
    if found.own is not None and found.own is not made:
        seconds, saved = found.own.time.seconds, found.own.memory.total - made.memory.total
        unfit = "" if _fits(found.own) else "; the recipe as it is does not fit"
        faster = "less" if made.time.seconds < seconds else "more"
        yield (
            f"  {abs(1 - made.time.seconds / seconds):.1%} {faster} time a step "
            f"than the recipe as it is ({seconds:.4g} s), "
            f"{abs(saved) / 2**30:.2f} GiB {'less' if saved > 0 else 'more'} a core{unfit}"
        )


def _changes(survey: Survey, candidate: Candidate) -> str:
    mine, theirs = settings(candidate.recipe), settings(survey.own.recipe if survey.own else survey.recipe)
    changed = [f"{key}={str(value).lower()}" for key, value in mine.items() if value != theirs[key]]
    return " ".join(changed) or "nothing: the recipe as it is"
