"""A plan of a server: its own `prefill` and `decode`, compiled for cores that are not there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainfw.errors import UserError
from trainfw.hardware import Topology, duration
from trainfw.parallel import Layout
from trainfw.planning.predict.serving import (
    Kept,
    Load,
    Quantities,
    ServingEstimate,
    ServingMemory,
    decoder_quantities,
    serving_estimate,
)
from trainfw.planning.read_step.analysis import read
from trainfw.planning.read_step.memory import corrected_temporaries
from trainfw.report import amount, servers_page

if TYPE_CHECKING:
    from trainfw.program import Server

HEADROOM = 0.3
"""Share of a fleet's tokens a second that is left free, by default: requests do not come evenly."""


@dataclass(frozen=True, repr=False)
class ServerPlan:
    """Predictions for a server, by number of slots."""

    model: str
    layout: Layout
    weights: str
    cache: str
    length: int
    estimates: tuple[ServingEstimate, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys: of `slots` one entry for each number; seconds, bytes and dollars."""
        topology, load = self.estimates[0].topology, self.estimates[0].load
        return {
            "model": self.model,
            "hardware": {"topology": topology.name, "count": topology.count, "lnc": topology.lnc},
            "memory_capacity_bytes_per_core": topology.hbm_size,
            "layout": str(self.layout),
            "weights": self.weights,
            "cache": self.cache,
            "length": self.length,
            "prompt": load.prompt,
            "output": load.output,
            "slots": [estimate.to_json() for estimate in self.estimates],
            "assumptions": list(self.estimates[0].assumptions),
        }

    def page(self) -> str:
        """Return it as an HTML page that loads nothing."""
        first = self.estimates[0]
        shape = f"weights {self.weights}, cache {self.cache}, slots of {self.length:,} tokens"
        lines = [str(self.layout), shape, *_of_load(first.load)]
        return servers_page(
            f"{self.model} on {first.topology.in_words}", lines, self.to_json(), first.topology.dollars_per_hour
        )

    def __repr__(self) -> str:
        return f"<ServerPlan: {self.model} on {self.estimates[0].topology.in_words}>"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_server(
    build: Callable[[int], Server],
    topology: Topology,
    *,
    model: str,
    slots: list[int],
    prompt: int,
    output: int,
    progress: Callable[[str], None] = lambda _: None,
) -> ServerPlan:
    """Plan servers of a model that differ in their slots.

    Args:
        build: number of slots of each group of devices -> the server.
        prompt, output: tokens of a prompt and of its answer.

    Raises UserError where no server has room for them, and where the hardware lacks a figure that this takes.
    """
    estimates, first = [], None
    for count in slots:
        server = build(count)
        check_room(server, prompt, output)
        runs = []
        for name in ("prefill", "decode"):
            progress(f"compiling {name} of {server.shape.slots:,} slots for {server.mesh.size:,} cores")
            runs.append(read_run(server, name, topology))
        estimates.append(estimate_server(server, prompt, output, *runs))
        first = first or server
    assert first is not None
    return ServerPlan(
        model=model,
        layout=first.fit.layout,
        weights=kept_dtype(first),
        cache=first.shape.cache,
        length=first.shape.length,
        estimates=tuple(estimates),
    )


def check_room(server: Server, prompt: int, output: int) -> None:
    """Raise UserError where a slot has no room for a prompt and its answer."""
    if prompt + output > server.shape.length:
        raise UserError(
            f"--length {server.shape.length:,}: has no room for --prompt {prompt:,} and --output {output:,}; "
            f"expected {prompt + output:,} at least"
        )


def kept_dtype(server: Server) -> str:
    """Return the dtype that weights are kept in."""
    recipe = server.recipe
    return (None if recipe.adapter is None else recipe.adapter.base) or recipe.train.compute_dtype


@dataclass(frozen=True)
class CompiledRun:
    """One run of a server's function on a core, as it was compiled."""

    quantities: Quantities
    temporaries: int
    """Bytes."""


def run_by_formula(server: Server, name: str) -> Quantities:
    """Count by formula what a core does in one run of `prefill` or of `decode`."""
    shape, layout = server.shape, server.fit.layout
    products = "f32" if server.recipe.train.compute_dtype == "float32" else "bf16"
    kept = Kept(layout.tensor, layout.expert, weights=kept_dtype(server), cache=shape.cache, products=products)
    rows, tokens = (1, shape.chunk) if name == "prefill" else (shape.slots // server.shards, 1)
    return decoder_quantities(
        server.recipe.model, kept, rows=rows, tokens=tokens, attended=shape.length, chunk=shape.chunk
    )


def read_run(server: Server, name: str, topology: Topology) -> CompiledRun:
    """Compile `prefill` or `decode`, and read what a core does in one run.

    Products and collectives are those of the compiled function, and weights those that it takes. Caches and all else
    that passes through memory are counted by formula, as they were where the chip's figures were fitted.
    """
    from trainfw.checking import read_function

    formula, function = run_by_formula(server, name), server.functions[name]
    reading = read_function(function.jitted, function.arguments, server.mesh, topology)
    assert reading.partitioned is not None
    analysis = read(reading.partitioned.module, reading.mesh, Layout())
    flops: defaultdict[str, float] = defaultdict(float)
    for matmul in analysis.matmuls:
        flops[matmul.dtype] += matmul.flops
    layout, weights = server.fit.layout, _bytes_of_core(server.abstract_params)
    if layout.fsdp * layout.expert > 1:  # kept in parts, but gathered for every run, and read whole
        weights = defaultdict(float, formula.weights)
    elif server.recipe.model.model_dump().get("tie_embeddings") is False:  # rows are looked up of it
        table = server.abstract_params["embedding"]
        for dtype, size in _bytes_of_core(table).items():
            weights[dtype] -= size
    found = replace(formula, weights=dict(weights), flops=dict(flops), transfers=analysis.transfers)
    return CompiledRun(found, corrected_temporaries(reading.partitioned, ("params", "state")) or 0)


def held_by(server: Server) -> ServingMemory:
    """Count the bytes that a core holds of a server, from its arrays' shardings; temporaries are left out."""
    caches = sum(_bytes_of_core(server.abstract_state["caches"]).values())
    slots = server.shape.slots // server.shards
    return ServingMemory(weights=sum(_bytes_of_core(server.abstract_params).values()), slot=caches / slots)


def estimate_server(
    server: Server, prompt: int, output: int, prefill: CompiledRun, decode: CompiledRun
) -> ServingEstimate:
    """Predict a server from one run of each of its functions.

    Raises UserError where the hardware has no figure for a rate that this takes.
    """
    load = Load(server.shape.slots, prompt, output, server.shape.chunk, server.shards)
    held = replace(held_by(server), temporaries=max(prefill.temporaries, decode.temporaries))
    assert server.fit.placement is not None  # its recipe names the topology
    made = serving_estimate(prefill.quantities, decode.quantities, load, held, server.fit.placement)
    dtype = kept_dtype(server)
    if dtype in ("int8", "nf4"):
        widened = f"{dtype} weights are widened where they are multiplied, and pass through memory once, as kept"
        made = replace(made, assumptions=(*made.assumptions, widened))
    return made


def _bytes_of_core(tree: object) -> defaultdict[str, float]:
    """Count a core's bytes of arrays that are described with their shardings, by dtype."""
    import jax

    sizes: defaultdict[str, float] = defaultdict(float)
    for leaf in jax.tree.leaves(tree):
        sizes[leaf.dtype.name] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sizes


def fleet(
    estimate: ServingEstimate, requests_per_second: float, headroom: float = HEADROOM
) -> tuple[int, float | None]:
    """Return (units of the topology that a load takes, their dollars an hour, None where no price is known).

    Args:
        requests_per_second: of prompts and answers as in the plan.
        headroom: share of the tokens a second that is left free.
    """
    topology, load = estimate.topology, estimate.load
    per_unit = estimate.tokens_per_second / topology.count * (1 - headroom)
    units = max(1, math.ceil(requests_per_second * load.output / per_unit))
    hourly = topology.dollars_per_hour
    return units, None if hourly is None else hourly / topology.count * units


def _of_load(load: Load) -> Iterator[str]:
    yield f"prompts of {load.prompt:,} tokens, answers of {load.output:,}"
    if load.shards > 1:
        yield f"slots are those of all {load.shards:,} groups of cores that have slots of their own"


def _lines(plan: ServerPlan) -> Iterator[str]:
    first = plan.estimates[0]
    topology, load = first.topology, first.load
    yield f"serving {plan.model} on {topology.in_words}: {plan.layout}"
    yield "A prediction: nothing of it has run on this hardware."
    yield f"weights {plan.weights}, cache {plan.cache}, slots of {plan.length:,} tokens"
    yield from _of_load(load)
    yield ""
    head = f"{'slots':>6}  {'first token':>11}  {'a token':>9}  {'tokens/s':>9}  {'memory':>9}  {'fit':>6}  "
    yield head + f"{'$/1M tok.':>9}  bound by"
    for estimate in plan.estimates:
        fit, dollars = estimate.slots_that_fit, estimate.dollars_per_million_tokens
        yield (
            f"{estimate.load.slots:>6,}  {duration(estimate.time_to_first_token_seconds):>11}  "
            f"{duration(estimate.time_per_token_seconds):>9}  {estimate.tokens_per_second:>9,.4g}  "
            f"{amount(int(estimate.memory_bytes_per_core), 'B'):>9}  {'?' if fit is None else f'{fit:,}':>6}  "
            f"{'?' if dollars is None else f'{dollars:,.3g}':>9}  {estimate.bound_by}"
        )
    for estimate in plan.estimates:
        fit = estimate.slots_that_fit
        if fit is not None and fit < estimate.load.slots:
            yield f"{estimate.load.slots:,} slots do not fit: {fit:,} do"
    yield ""
    yield "memory of a core"
    held = first.held
    for label, size in (("weights", held.weights), ("a slot", held.slot), ("temporaries", held.temporaries)):
        yield f"  {label:12}  {amount(int(size), 'B')}"
    for name, time in (("a chunk of prefill", first.prefill), ("a token of decode", first.decode)):
        yield f"{name}: {duration(time.seconds)}"
        yield "  " + ", ".join(f"{part} {duration(seconds)}" for part, seconds in time.parts.items() if seconds)
    yield ""
    yield "assumed"
    yield from (f"  {text}" for text in first.assumptions)
