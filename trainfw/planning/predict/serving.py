"""The time and memory of serving a model, from what its functions read, compute and send on one core.

One after the other on a core: weights and cache are read, or products are computed, whichever takes longer; all else
passes through memory; collectives take the time of their links; and every layer takes a fixed time. Three figures of
the chip's file (`serving`) say what of its memory's bandwidth is reached and what that fixed time is. They were fitted
on published times per token (benchmarks/decode_accuracy.py); without them times are lower bounds, and say so.

`decoder_quantities` counts by formula, from a model's config, what is else read from compiled functions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trainfw.backends import load_sdk
from trainfw.errors import UserError, did_you_mean, expect
from trainfw.hardware import Topology
from trainfw.models import FamilyConfig, ModelShapes, family_of, vocabulary_of
from trainfw.parallel import MeshPlacement, Placement
from trainfw.planning.predict.link_time import transfer_seconds
from trainfw.planning.predict.step_time import hlo_peak, memory_rate
from trainfw.planning.read_step.analysis import Transfer

KEPT_BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "nf4": 0.5 + 1 / 64,  # a scale of a byte for 64 weights
    "q8_0": 34 / 32,  # GGUF's blocks of 32 weights, with a scale of two bytes each
    "q4_0": 18 / 32,
}
"""Bytes of a weight by the dtype it is kept in."""

CACHE_BYTES: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}
"""Bytes of a number in a cache; int8 has a scale, f32, for each token and head besides."""

_LAYER_PASSES = 12
"""Times that a layer's elementwise operations move a token as wide as the model, in f32, each through memory: two norms
(two reads and a write each), two sums with the residual stream (the same)."""
_SCORE_PASSES = 10
"""Times that scores, f32, pass through memory where no kernel keeps them on chip: written by the product; read and
written by mask, exponential and division; read for the maximum, the sum and the product with values."""


@dataclass(frozen=True)
class Quantities:
    """Quantities of one run of a function on one core."""

    weights: Mapping[str, float]
    """Bytes that are read, by the dtype weights are kept in."""
    cache: float
    """Bytes of slots' caches that are read and written."""
    activations: float
    """Bytes of everything else that passes through memory."""
    flops: Mapping[str, float]
    """FLOPs of matrix products, by dtype as HLO names it."""
    tokens: int
    """Tokens that are multiplied by a weight at once."""
    layers: int
    transfers: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class FunctionTime:
    """One run of a function, predicted."""

    parts: Mapping[str, float]
    """Seconds, which add up: `weights` and `cache`, or `compute` where that is longer; `activations`, `collectives`,
    `layers` (their fixed time)."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """Name the part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


def function_time(quantities: Quantities, placement: Placement | MeshPlacement) -> FunctionTime:
    """The time of one run on the hardware of `placement`.

    Raises UserError where the hardware has no figure for a rate that this takes.
    """
    topology, parts = placement.topology, dict[str, float]()
    rate, figures = memory_rate(topology), topology.figures

    def figure(name: str, default: float) -> float:
        return figures[name].number if name in figures else default

    rest = rate * figure("chip.serving.memory_efficiency", 1.0)
    weights = sum(quantities.weights.values()) / rate / figure("chip.serving.weights_efficiency", 1.0)
    cache = quantities.cache / rest
    engine, share = topology.chip.tensor_engine, figure("chip.matmul_efficiency", 1.0)
    # Of few tokens at once, the engine's shortest pass is mostly empty; of many, it reaches its usual share.
    wasted = max(1 / share, 0.0 if engine is None else engine.moving_cycles / quantities.tokens)
    compute = sum(flops * wasted / hlo_peak(topology, dtype) for dtype, flops in quantities.flops.items())
    parts |= {"compute": compute} if compute > weights + cache else {"weights": weights, "cache": cache}
    parts["activations"] = quantities.activations / rest
    sent = ((transfer_seconds(transfer, placement).seconds, transfer.times) for transfer in quantities.transfers)
    parts["collectives"] = sum(seconds * times for seconds, times in sent)
    parts["layers"] = quantities.layers * figure("chip.serving.layer_time", 0.0)
    return FunctionTime(parts)


@dataclass(frozen=True)
class Kept:
    """A decoder as a group of cores keeps it: how it is split, and in which dtypes."""

    tensor: int = 1
    expert: int = 1
    """Cores, or groups of `tensor` cores, that share the experts; all else each has whole. (By its default rules
    trainfw shares that too, and gathers it in every run: read such a layout from the compiled functions.)"""
    weights: str = "bfloat16"
    """One of `KEPT_BYTES`."""
    tables: str = ""
    """Dtype of embedding and output head; empty: as other matrices."""
    cache: str = "bfloat16"
    """One of `CACHE_BYTES`."""
    products: str = "bf16"
    """Dtype of products, as HLO names it."""
    touched_experts: bool = False
    """True where products are grouped by expert, so that only experts are read that a token goes to. Else every expert
    has room for every token, and all are read and multiplied."""

    def __post_init__(self) -> None:
        for name in ("tensor", "expert"):
            expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name, known in (("weights", KEPT_BYTES), ("tables", {"": 0.0, **KEPT_BYTES}), ("cache", CACHE_BYTES)):
            if (given := getattr(self, name)) not in known:
                names = ", ".join(filter(None, known))
                raise UserError(f"{name} = {given!r}: expected one of {names}{did_you_mean(given, known)}")


def heads_of_core(shapes: ModelShapes, tensor: int) -> tuple[int, int]:
    """(query heads, kv heads) of the core with most of them.

    Where more cores than kv heads share them, each keeps the one that its query heads need. Where neither number
    divides the other, or a kv head's query heads do not divide over its cores, each query head has a kv head of its
    own, as in attention without groups ("convert to MHA", optimum-neuron 213224e .../modules/attention/gqa.py), and
    heads are padded to a multiple of the cores. trainfw itself refuses such layouts.
    """
    heads, kv_heads = shapes.num_heads, shapes.num_kv_heads
    if kv_heads % tensor == 0:
        return heads // tensor, kv_heads // tensor
    if tensor % kv_heads == 0 and (heads // kv_heads) % (tensor // kv_heads) == 0:
        return heads // tensor, 1
    return -(-heads // tensor), -(-heads // tensor)


def decoder_quantities(
    config: FamilyConfig, kept: Kept, *, rows: int, tokens: int, attended: int, chunk: int | None = None
) -> Quantities:
    """Quantities of a decoder on `tokens` new tokens of each of `rows` slots of a core, by formula.

    A token of `decode`: tokens=1 and a row for each of the core's slots. A chunk of `prefill`: tokens=chunk, rows=1.

    Args:
        attended: tokens of a slot that attention reads beside the new ones: its room, where shapes are static; else
            what it holds.
        chunk: tokens that a window is longer in the cache than in the model (`ServerShape.chunk`); default: `tokens`.

    Raises UserError for a model that no text can be drawn from.
    """
    shapes = _shapes(config)
    held, layers, width, experts = _elements(shapes, kept), config.num_layers, config.hidden_size, shapes.experts
    many, vocabulary = rows * tokens, vocabulary_of(config) // kept.tensor
    touched, passed = 1.0, 1.0  # shares of the core's experts: read, and multiplied by a token
    if experts is not None and kept.touched_experts:
        passed = experts.per_token / experts.number
        touched = 1.0 - (1.0 - passed) ** (many * kept.expert)
    read: defaultdict[str, float] = defaultdict(float)
    for kind, elements in held.items():
        dtype = _dtype(kind, kept)
        if kind == "table":  # the head is read whole; of an embedding of its own, the rows of the tokens
            tied = sum(weight.kind == "table" for weight in shapes.weights) == 1
            elements = vocabulary * width + (0 if tied else many * width / kept.tensor)
        read[dtype] += elements * KEPT_BYTES[dtype] * (touched if kind == "layers.experts" else 1.0)
    multiplied = held["layers.kernel"] + held["layers.router"] + held["layers.experts"] * kept.expert * passed
    queries, _ = heads_of_core(shapes, kept.tensor)
    seen = _seen(shapes, attended, chunk or tokens)
    scored = seen + tokens * layers  # by each token: what its slot holds, and the new tokens
    flops = 2.0 * many * multiplied + 2.0 * rows * vocabulary * width
    flops += 4.0 * many * scored * queries * shapes.head_dim
    return Quantities(
        weights=dict(read),
        cache=(rows * seen + many * layers) * _cache_bytes_of_token(shapes, kept),
        activations=4.0 * many * (_LAYER_PASSES * width * layers + _SCORE_PASSES * queries * scored),
        flops={kept.products: flops},
        tokens=many,
        layers=layers,
        transfers=tuple(_transfers(config, shapes, kept, rows, many)),
    )


def _shapes(config: FamilyConfig) -> ModelShapes:
    family = family_of(config)
    shapes = family.shapes(config) if family.decodes else None
    if shapes is None:
        raise UserError(f"model.family = {config.family!r}: no text can be drawn from its models")
    return shapes


def _transfers(config: FamilyConfig, shapes: ModelShapes, kept: Kept, rows: int, many: int) -> Iterator[Transfer]:
    """List the collectives of a run: sums of a layer's halves and of the embedding, logits, tokens to experts."""
    size = (4 if kept.products == "f32" else 2) * many * config.hidden_size
    if kept.tensor > 1:
        yield Transfer("all-reduce", ("tensor",), kept.products, size, 2 * config.num_layers + 1)
        yield Transfer("all-gather", ("tensor",), "f32", 4 * rows * vocabulary_of(config), 1)
    if kept.expert > 1 and shapes.experts is not None:
        choices = shapes.experts.per_token if kept.touched_experts else shapes.experts.number
        yield Transfer("all-to-all", ("expert",), kept.products, size * choices, 2 * config.num_layers)


def _elements(shapes: ModelShapes, kept: Kept) -> defaultdict[str, float]:
    """Count the elements of a core's part of the weights, of all layers, by kind."""
    held: defaultdict[str, float] = defaultdict(float)
    for weight in shapes.weights:
        parts = kept.tensor if weight.split in (1, 2) else 1
        held[weight.kind] += weight.elements / (parts * (kept.expert if weight.kind == "layers.experts" else 1))
    layers, width, _ = next(weight.shape for weight in shapes.weights if weight.kind == "layers.kernel")
    even = (shapes.num_heads + shapes.num_kv_heads) / kept.tensor
    more = sum(heads_of_core(shapes, kept.tensor)) - even  # heads that are padded or repeated
    held["layers.kernel"] += 2 * layers * width * shapes.head_dim * more
    return held


def _dtype(kind: str, kept: Kept) -> str:
    if kind == "table":
        return kept.tables or kept.weights
    if kind in ("layers.kernel", "layers.experts"):
        return kept.weights
    return "float32" if kept.weights == "float32" else "bfloat16"


def _seen(shapes: ModelShapes, attended: int, chunk: int) -> int:
    """Count the tokens of a slot that all layers hold, or read: of those that slide, a window and a chunk."""
    return sum(attended if window is None else min(attended, window + chunk) for window in shapes.windows)


def _cache_bytes_of_token(shapes: ModelShapes, kept: Kept) -> float:
    _, kv_heads = heads_of_core(shapes, kept.tensor)
    return 2 * kv_heads * (shapes.head_dim * CACHE_BYTES[kept.cache] + (4 if kept.cache == "int8" else 0))


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that a core holds while it serves."""

    weights: float
    slot: float
    """Bytes of a slot's cache, on each of the cores that share it."""
    temporaries: float = 0.0
    """Bytes of the function that takes most, as it runs."""


def decoder_held(config: FamilyConfig, kept: Kept, *, length: int, chunk: int) -> ServingMemory:
    """Bytes that a core holds of a decoder whose slots hold `length` tokens, by formula; temporaries are left out.

    Raises UserError for a model that no text can be drawn from.
    """
    shapes = _shapes(config)
    weights = sum(elements * KEPT_BYTES[_dtype(kind, kept)] for kind, elements in _elements(shapes, kept).items())
    return ServingMemory(weights, _seen(shapes, length, chunk) * _cache_bytes_of_token(shapes, kept))


@dataclass(frozen=True)
class Load:
    """Requests that a server's slots work on, all of them alike."""

    slots: int
    """Requests that are answered at once, by all groups together."""
    prompt: int
    """Tokens of a prompt."""
    output: int
    """Tokens of an answer."""
    chunk: int
    """Tokens of a prompt that one run of `prefill` takes."""
    shards: int = 1
    """Groups of cores that have slots of their own; each prefills one prompt at a time, while its slots wait."""

    def __post_init__(self) -> None:
        for name in ("slots", "prompt", "output", "chunk", "shards"):
            expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.slots % self.shards:
            raise UserError(f"slots = {self.slots}: there are {self.shards} groups of cores; expected a multiple")


@dataclass(frozen=True)
class ServingEstimate:
    """Prediction for a server whose slots are all busy."""

    topology: Topology
    load: Load
    prefill: FunctionTime
    decode: FunctionTime
    held: ServingMemory
    overhead: float
    """Bytes of a core that the runtime takes."""
    assumptions: tuple[str, ...] = field(default=())
    """Words for people."""

    @property
    def time_to_first_token_seconds(self) -> float:
        """Time of a prompt's chunks, from when a slot is free."""
        return math.ceil(self.load.prompt / self.load.chunk) * self.prefill.seconds

    @property
    def time_per_token_seconds(self) -> float:
        return self.decode.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens written a second by all slots, which wait while a prompt is read in their group."""
        load = self.load
        waited = load.slots / load.shards * self.time_to_first_token_seconds
        return load.slots * load.output / (waited + load.output * self.time_per_token_seconds)

    @property
    def memory_parts_bytes_per_core(self) -> Mapping[str, float]:
        """Bytes of a core by what they are for."""
        slots, held = self.load.slots // self.load.shards, self.held
        caches = slots * held.slot
        return {"weights": held.weights, "caches": caches, "temporaries": held.temporaries, "runtime": self.overhead}

    @property
    def memory_bytes_per_core(self) -> float:
        return sum(self.memory_parts_bytes_per_core.values())

    @property
    def slots_that_fit(self) -> int | None:
        """Count the slots of all groups for which a core has the memory; None where nobody says how much it has."""
        if (capacity := self.topology.hbm_size) is None:
            return None
        free = capacity - self.overhead - self.held.weights - self.held.temporaries
        return max(int(free // self.held.slot), 0) * self.load.shards

    @property
    def dollars_per_million_tokens(self) -> float | None:
        """Price of a million written tokens, or None where no dated source gives that of the hardware (no guess)."""
        hourly = self.topology.dollars_per_hour
        return None if hourly is None else hourly / 3600 / self.tokens_per_second * 1e6

    @property
    def bound_by(self) -> str:
        """Name the part of `decode` that takes longest."""
        return self.decode.bound_by

    def to_json(self) -> dict[str, object]:
        """Plain data with stable keys."""
        keys = (
            *("time_to_first_token_seconds", "time_per_token_seconds", "tokens_per_second", "memory_bytes_per_core"),
            *("memory_parts_bytes_per_core", "slots_that_fit", "dollars_per_million_tokens", "bound_by"),
        )
        times = {"prefill_parts_seconds": dict(self.prefill.parts), "decode_parts_seconds": dict(self.decode.parts)}
        return {"slots": self.load.slots, **{key: getattr(self, key) for key in keys}, **times}


def serving_estimate(
    prefill: Quantities, decode: Quantities, load: Load, held: ServingMemory, placement: Placement | MeshPlacement
) -> ServingEstimate:
    """Predict a server from the quantities of one run of each of its functions on one core.

    Raises UserError where the hardware has no figure for a rate that this takes.
    """
    topology = placement.topology
    return ServingEstimate(
        topology=topology,
        load=load,
        prefill=function_time(prefill, placement),
        decode=function_time(decode, placement),
        held=held,
        overhead=load_sdk().core_overhead(topology),
        assumptions=tuple(_words(topology)),
    )


def _words(topology: Topology) -> list[str]:
    """Say what the times rest on."""
    figures, said = topology.figures, []
    if topology.chip.serving is None:
        said.append("memory is read at all of its bandwidth and layers cost nothing more: times are lower bounds")
    else:
        weights, rest = (figures[f"chip.serving.{name}_efficiency"] for name in ("weights", "memory"))
        time = figures["chip.serving.layer_time"]
        said.append(
            f"weights are read at {weights.number:.0%} of the memory's bandwidth, all else at {rest.number:.0%}, and a "
            f"layer takes {time.value} besides ({time.note or time.source})"
        )
    price = topology.price
    paid = "no dated source gives its price" if price is None else f"price: {price.terms}, {price.date}"
    return [*said, f"{topology.name}: {paid}"]
