"""The search for a server's layout: all layouts of the hardware's cores, and the compiler over those that may fit.

Judged without compiling: layouts that `build_server` refuses; servers whose weights and caches alone are more than a
core has; and those over more of `fsdp` than fits, whose cores compute the same and gather more. `data` adds groups of
cores that do the same. So there is one compilation of `prefill` for each size of `tensor` and `expert`, at the least
`fsdp` that fits, and of `decode` one for each number of slots.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainfw.backends import load_sdk
from trainfw.errors import UserError
from trainfw.hardware import Topology, duration
from trainfw.parallel import Layout
from trainfw.planning.predict.server_plan import (
    check_room,
    estimate_server,
    held_by,
    read_run,
    run_by_formula,
)
from trainfw.planning.predict.serving import ServingEstimate, function_time
from trainfw.planning.search.candidates import layouts, pareto
from trainfw.planning.search.search import ROOM
from trainfw.recipe import Recipe, layout_problems
from trainfw.report import servers_page
from trainfw.serving import Serving, absent_recipe, build_absent
from trainfw.tables import table

if TYPE_CHECKING:
    from trainfw.program import Server

LIMIT = 130.0
"""Seconds after which nothing further is compiled."""

_AXES = ("data", "fsdp", "expert", "tensor")
FRONTS = ("time_per_token", "time_to_first_token")
"""Times that are weighed against the price of a token."""


@dataclass(frozen=True)
class PlannedServer:
    """A server of one layout and one number of slots."""

    layout: Layout
    estimate: ServingEstimate

    @property
    def option(self) -> str:
        """Write the layout as `--layout` takes it."""
        sizes = self.layout.sizes
        return ",".join(f"{axis}={sizes[axis]}" for axis in _AXES if sizes[axis] > 1) or "data=1"

    @property
    def fits(self) -> bool:
        """Tell whether it leaves some of a core's memory."""
        return self.estimate.memory_bytes_per_core <= _room(self.estimate.topology)


@dataclass(frozen=True, repr=False)
class FoundServers:
    """Result of a search."""

    asked: Serving
    topology: Topology
    layouts: int
    """Layouts that there are."""
    refused: Counter[str]
    """Reason -> how many of them cannot be built."""
    slots: tuple[int, ...]
    """Numbers of slots of a group of cores that each layout was to have."""
    too_large: int
    """Servers (a layout and a number of slots) whose weights and caches alone are too large."""
    least: tuple[float, Layout] | None
    """The fewest bytes that a core needs, without temporaries, and in which layout."""
    skipped: int
    """Servers over more of `fsdp` than fits."""
    out_of_time: int
    """Servers that were to be compiled when the time was over."""
    planned: tuple[PlannedServer, ...]
    """Servers that were compiled, the cheapest token first."""
    seconds: float

    @property
    def fitting(self) -> list[PlannedServer]:
        """List those that fit with memory to spare."""
        return [server for server in self.planned if server.fits]

    @property
    def fronts(self) -> dict[str, list[PlannedServer]]:
        """For each of `FRONTS`, list those of `fitting` that no other beats in that time and in price, by time.

        Where hardware has no price, the cheapest token is still the one of which a second brings most.
        """
        return {front: pareto(self.fitting, functools.partial(_values, front)) for front in FRONTS}

    @property
    def pareto(self) -> list[PlannedServer]:
        """List those on either front, by time per token."""
        fronts = self.fronts.values()
        on_one = [server for server in self.fitting if any(server in front for front in fronts)]
        return sorted(on_one, key=functools.partial(_values, FRONTS[0]))

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys: seconds, bytes and dollars."""
        topology, fronts = self.topology, self.fronts
        return {
            "model": self.asked.model,
            "hardware": {"topology": topology.name, "count": topology.count, "lnc": topology.lnc},
            "memory_capacity_bytes_per_core": topology.hbm_size,
            "weights": self.asked.weights,
            "cache": self.asked.cache,
            "length": self.asked.length,
            "layouts": self.layouts,
            "refused": dict(self.refused),
            "too_large": self.too_large,
            "not_compiled": {"more_fsdp_than_fits": self.skipped, "out_of_time": self.out_of_time},
            "servers": [
                {
                    "layout": {axis: server.layout.sizes[axis] for axis in _AXES},
                    "fits_with_room": server.fits,
                    "pareto": [name for name, front in fronts.items() if server in front],
                    **server.estimate.to_json(),
                }
                for server in self.planned
            ],
            "assumptions": list(self.planned[0].estimate.assumptions) if self.planned else [],
        }

    def page(self) -> str:
        """Return it as an HTML page that loads nothing."""
        topology, asked = self.topology, self.asked
        shape = f"weights {asked.weights}, cache {asked.cache}, slots of {asked.length:,} tokens"
        title, price = f"{asked.model} on {topology.in_words}", topology.dollars_per_hour
        return servers_page(title, [shape, "slots are those of all groups of cores"], self.to_json(), price)

    def __repr__(self) -> str:
        return f"<FoundServers: {len(self.planned)} planned of {self.asked.model} on {self.topology.in_words}>"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _values(front: str, server: PlannedServer) -> tuple[float, float]:
    """Return (one of `FRONTS`, seconds of all the hardware for a token)."""
    estimate = server.estimate
    seconds = estimate.time_per_token_seconds if front == FRONTS[0] else estimate.time_to_first_token_seconds
    return seconds, 1 / estimate.tokens_per_second


def _room(topology: Topology) -> float:
    return math.inf if topology.hbm_size is None else topology.hbm_size * ROOM


def search_servers(
    asked: Serving,
    topology: Topology,
    slots: list[int],
    *,
    prompt: int,
    output: int,
    progress: Callable[[str], None] = lambda _: None,
    limit: float = LIMIT,
) -> FoundServers:
    """Plan servers of a model in every layout of as many simulated devices as the topology has cores.

    Args:
        asked: its `layout` and `slots` are not read.
        slots: numbers of slots of each group of cores.
        limit: seconds after which nothing further is compiled.

    Raises UserError where no server has room for prompt and answer, and where the hardware lacks a figure.
    """
    started = time.monotonic()
    recipe = absent_recipe(replace(asked, layout={"data": topology.cores}), topology)
    every = [layout for layout in layouts(topology.cores, recipe) if layout.pipeline == layout.context == 1]
    build = functools.partial(_build, asked, topology)
    progress(f"building {len(every):,} layouts of {topology.cores:,} cores")
    built, refused = _build_all(every, build, slots[0], recipe)
    for server in itertools.islice(built.values(), 1):
        check_room(server, prompt, output)
    needs = {(layout, count): _needs(server, count) for layout, server in built.items() for count in slots}
    small = {key for key, size in needs.items() if size <= _room(topology)}
    progress(f"{len(built):,} can be built; with {len(slots)} numbers of slots, {len(small):,} servers may fit")

    def plan(layout: Layout, counts: list[int]) -> list[PlannedServer]:
        return _compile([build(layout, count) for count in counts], topology, prompt, output, progress)

    planned, skipped, late = _plan_all(_families(built), slots, small, plan, started + limit)
    return FoundServers(
        asked=asked,
        topology=topology,
        layouts=len(every),
        refused=refused,
        slots=tuple(slots),
        too_large=len(needs) - len(small),
        least=min(((size, layout) for (layout, _), size in needs.items()), key=lambda pair: pair[0], default=None),
        skipped=skipped,
        out_of_time=late,
        planned=tuple(sorted(planned, key=lambda server: _values(FRONTS[0], server)[::-1])),
        seconds=time.monotonic() - started,
    )


def _plan_all(
    families: list[list[Layout]],
    slots: list[int],
    small: set[tuple[Layout, int]],
    plan: Callable[[Layout, list[int]], list[PlannedServer]],
    deadline: float,
) -> tuple[list[PlannedServer], int, int]:
    """Plan of each family the first layout that fits, for each number of slots.

    Returns also how many servers were left out since an earlier layout fits, and how many for lack of time.
    """
    planned: list[PlannedServer] = []
    skipped = late = 0
    for family in families:
        wanted = set(slots)
        for layout in family:
            may_fit = {count for count in slots if (layout, count) in small}
            counts = sorted(may_fit & wanted)
            skipped += len(may_fit - wanted)
            if counts and time.monotonic() > deadline:
                late += len(counts)
                wanted -= set(counts)
                continue
            made = plan(layout, counts) if counts else []
            planned += made
            wanted -= {count for count, server in zip(counts, made, strict=True) if server.fits}
    return planned, skipped, late


def _build_all(
    every: list[Layout], build: Callable[[Layout, int], Server], slots: int, recipe: Recipe
) -> tuple[dict[Layout, Server], Counter[str]]:
    """Return the servers that can be built, and the reasons why the others cannot."""
    built, refused = {}, Counter[str]()
    for layout in every:
        try:
            built[layout] = build(layout, slots)
        except UserError as error:
            refused[_reason(error, recipe, layout)] += 1
    return built, refused


def _build(asked: Serving, topology: Topology, layout: Layout, slots: int) -> Server:
    sizes = {axis: layout.sizes[axis] for axis in _AXES}
    return build_absent(replace(asked, layout=sizes, slots=slots), topology)


def _reason(error: UserError, recipe: Recipe, layout: Layout) -> str:
    """Say why a layout cannot be built, in words that are the same for all with that reason."""
    problems = (problem for problem in layout_problems(recipe, layout) if problem.key.startswith("model."))
    for problem in problems:
        return problem.reason
    text = str(error).removeprefix(f"{recipe.name}: ").removeprefix("recipe: ").replace(str(layout), "the layout")
    return re.split("[;.] ", text)[0]


def _needs(server: Server, slots: int) -> float:
    """Count a core's bytes with so many slots of each group, without temporaries."""
    held, placement = held_by(server), server.fit.placement
    assert placement is not None
    return load_sdk().core_overhead(placement.topology) + held.weights + slots * held.slot


def _families(built: dict[Layout, Server]) -> list[list[Layout]]:
    """Group layouts by all but `data` and `fsdp`, the least `fsdp` first; the group whose tokens take least leads."""
    families: defaultdict[tuple[int, int], list[Layout]] = defaultdict(list)
    for layout in sorted(built, key=lambda layout: layout.fsdp):
        families[layout.tensor, layout.expert].append(layout)

    def token(family: list[Layout]) -> float:
        server = built[family[0]]
        assert server.fit.placement is not None
        return function_time(run_by_formula(server, "decode"), server.fit.placement).seconds

    return sorted(families.values(), key=token)


def _compile(
    servers: list[Server], topology: Topology, prompt: int, output: int, progress: Callable[[str], None]
) -> list[PlannedServer]:
    """Plan servers of one layout, the one with most slots last.

    `prefill` reads one prompt however many slots there are, so the last one's counts for all; the copies that the CPU's
    compiler makes of a cache grow with it, so their memory is no less than their own.
    """
    layout, planned = servers[0].fit.layout, []
    progress(f"compiling {layout}")
    prefill = read_run(servers[-1], "prefill", topology)
    for server in servers:
        estimate = estimate_server(server, prompt, output, prefill, read_run(server, "decode", topology))
        made = PlannedServer(layout, estimate)
        planned.append(made)
        times = (
            f"{duration(estimate.time_per_token_seconds)} a token, {_gib(estimate.memory_bytes_per_core)} GiB a core"
        )
        progress(f"  {server.shape.slots:,} slots: {times}{'' if made.fits else ' (too large)'}")
    return planned


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _lines(found: FoundServers) -> Iterator[str]:
    asked, topology = found.asked, found.topology
    yield f"serving {asked.model} on {topology.in_words}: {topology.cores:,} cores"
    yield f"weights {asked.weights}, cache {asked.cache}, slots of {asked.length:,} tokens"
    counts = ", ".join(map(str, found.slots))
    yield f"{found.layouts:,} layouts, with {counts} slots a group of cores; {found.seconds:.0f} s"
    for reason, times in found.refused.most_common():
        yield f"  {times:4,} layouts refused: {reason}"
    share = f"{ROOM:.0%} of a core's memory"
    for times, why in (
        (found.too_large, f"servers refused: weights and caches alone take more than {share}"),
        (found.skipped, "servers not compiled: less fsdp fits, and gathers less"),
        (found.out_of_time, "servers not compiled for lack of time"),
        (len(found.planned), "servers compiled"),
        (len(found.planned) - len(found.fitting), f"of these refused: take more than {share}"),
    ):
        if times:
            yield f"  {times:4,} {why}"
    yield "A prediction: nothing of it has run on this hardware."
    if not found.fitting:
        yield from _nothing(found)
        return
    load, fronts = found.planned[0].estimate.load, found.fronts
    yield f"prompts of {load.prompt:,} tokens, answers of {load.output:,}"
    yield ""
    yield "T  nothing else has both a shorter time per token and a lower price of one"
    yield "F  nothing else has both a shorter time to the first token and a lower price"
    yield "slots of all groups of cores; GiB of a core; $/1M: dollars for a million tokens"
    yield ""
    rows = [("", "slots", "a token", "first", "tokens/s", "GiB", "$/1M", "layout")]
    for server in found.pareto:
        estimate, mark = server.estimate, "".join("TF"[i] for i, name in enumerate(FRONTS) if server in fronts[name])
        dollars = estimate.dollars_per_million_tokens
        token, first = estimate.time_per_token_seconds, estimate.time_to_first_token_seconds
        speed = (duration(token), duration(first), f"{estimate.tokens_per_second:,.4g}")
        price = "?" if dollars is None else f"{dollars:,.3g}"
        size = _gib(estimate.memory_bytes_per_core)
        rows.append((mark, f"{estimate.load.slots:,}", *speed, size, price, server.option))
    yield from table(rows, "<>>>>>><")
    if others := len(found.fitting) - len(found.pareto):
        yield f"{others:,} more fit, and are beaten in time and price: --json has them"
    yield ""
    yield "assumed"
    yield from (f"  {text}" for text in found.planned[0].estimate.assumptions)


def _nothing(found: FoundServers) -> Iterator[str]:
    """Say that no server fits, and how much is missing."""
    yield ""
    yield "nothing fits"
    if found.least is not None:
        size, layout = found.least
        capacity = _room(found.topology)
        yield f"least is needed by {layout}: {_gib(size)} GiB a core and more, of {_gib(capacity)}"
        if found.asked.weights not in ("int8", "nf4"):
            yield "try --weights int8, which halves bfloat16, or nf4"
