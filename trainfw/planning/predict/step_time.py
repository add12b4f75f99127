"""The time of a training step, from what a core computes and moves.

One after the other on a core: matrix products, at a share of the peak of their dtype or at the rate at which memory
delivers them; everything else, at the rate of memory; and what of the collectives does not run beside the products.
Not in it: the input pipeline (read ahead), checkpoints, what a host takes to launch a step, stragglers.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainfw.backends import for_topology
from trainfw.errors import UserError
from trainfw.hardware import Topology, duration
from trainfw.models import flops_per_token
from trainfw.parallel import MeshPlacement, Placement
from trainfw.planning.predict.link_time import TransferTime, transfer_seconds
from trainfw.planning.read_step.analysis import Analysis, Matmul, Transfer
from trainfw.recipe import Recipe
from trainfw.scopes import ATTENTION

OVERLAPPED = "weights, gradients, stages and rings"
"""Part whose collectives need not all be waited for (see `_beside`)."""

EFFICIENCY_SPREAD = 0.15
"""Least distance from the chip's figure, as a share of it, that the efficiency of matrix products may have.

The range of a prediction is made with it, or with the chip's `matmul_efficiency_range` where that is wider."""

_DTYPES: dict[str, tuple[str, ...]] = {
    "bf16": ("bfloat16",),
    "f16": ("float16",),
    "f32": ("tensorfloat32", "float32"),
    "f8e4m3": ("float8_e4m3", "float8_e4m3fn"),
    "f8e4m3fn": ("float8_e4m3fn", "float8_e4m3"),
    "f8e5m2": ("float8_e5m2",),
}
"""HLO's name of a dtype -> whose peak holds, the first that the chip has."""

_FUSED_BACKWARD = 5 / 4
"""Products of a fused attention kernel's backward pass per product of the plain one: it makes the scores again.

Dao, FlashAttention-2, arXiv:2307.08691, section 3.1: 5 products where the plain backward pass has 4."""
_CAUSAL = 1 / 2
"""Share of the scores that a fused kernel computes of causal attention: the half that counts (section 3.1 as well)."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions on how a program will run, which it does not say."""

    attention: Literal["xla", "fused"] = "xla"
    """`fused`: attention is a kernel that keeps the scores on chip and, where it is causal, skips those above the
    diagonal."""
    mixed: Literal["wide", "narrow"] = "wide"
    """Rate of products of two dtypes, that of either operand: compilers widen the narrow operand, unless a program is
    written with both narrow (as others' programs are: for comparing with their published times)."""
    overlap: float = 0.5
    """Share of the time of `OVERLAPPED` collectives that passes beside matrix products (placements are chosen by the
    same figure)."""


@dataclass(frozen=True, repr=False)
class WorkTime:
    """One run of a function, predicted."""

    seconds: float
    low: float
    """Seconds with all collectives hidden that can be, and products at the upper end of their `efficiency_range`."""
    high: float
    """Seconds with none hidden, doubtful links at half their rate, and products at the lower end."""
    parts: Mapping[str, float]
    """Seconds, which add up: `matmul`, `attention`, `memory` (elementwise operations and reductions), `optimizer`, and
    by mesh axes (`tensor`, `data+fsdp`) the collectives that are waited for."""
    hidden: Mapping[str, float]
    """Seconds of collectives that are not waited for, by mesh axes."""
    bound_by: str
    """`compute`, `hbm`, or the physical dim whose links take longest: `links.row`."""
    transfers: tuple[tuple[Transfer, TransferTime], ...]
    """Every collective with the time of one run."""
    products: tuple[float, ...]
    """Seconds in a step of each of the analysis's matrix products."""
    streamed: tuple[float, ...]
    """Seconds in a step of all that passes through memory, as the analysis has it."""
    assumptions: tuple[str, ...]
    """Words for people."""

    @property
    def longest(self) -> list[tuple[Transfer, TransferTime]]:
        """The transfers, those that take longest in all first."""
        return sorted(self.transfers, key=lambda pair: -pair[1].seconds * pair[0].times)

    @property
    def ends(self) -> str:
        return f"(from {duration(self.low)} to {duration(self.high)})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {duration(self.seconds)} {self.ends}, bound by {self.bound_by}>"


@dataclass(frozen=True, repr=False)
class StepTime(WorkTime):
    """One training step, predicted."""

    mfu: float
    """Model FLOPs (forward and backward, nothing recomputed, of causal attention the half that counts) over the peak of
    the compute dtype."""


def part_label(part: str) -> str:
    """Name a part of a step (see `StepTime.parts`) for people."""
    return _LABELS.get(part, f"collectives over {part.replace('+', ', ')}")


_LABELS = {
    "matmul": "matrix products",
    "attention": "attention scores",
    "memory": "elementwise and reductions",
    "optimizer": "optimizer and sums of gradients",
}


def part_lines(time: WorkTime) -> Iterator[str]:
    """Write a line for each part that is more than a twentieth of a per cent, the longest first."""
    for part, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        if seconds > 0.0005 * time.seconds:
            hidden = time.hidden.get(part, 0.0)
            beside = f"  (and {duration(hidden)} beside matrix products)" if hidden else ""
            yield f"  {part_label(part):32} {duration(seconds):>9} {seconds / time.seconds:6.1%}{beside}"


def fit_line(headroom: float) -> str:
    """Say whether a core has the memory, of which so many bytes are left, or lacking."""
    size = f"{abs(headroom) / 2**30:,.2f} GiB"
    if headroom >= 0:
        return f"fits: a core has {size} to spare."
    return f"DOES NOT FIT: a core needs {size} more than it has."


def assumptions_of(recipe: Recipe) -> Assumptions:
    return Assumptions(attention="fused" if recipe.hardware.fused_attention else "xla")


def step_time(
    analysis: Analysis, placement: Placement, recipe: Recipe, assumptions: Assumptions | None = None
) -> StepTime:
    """The time of one step of `recipe` (at full size), which was read as `analysis`, on the hardware of `placement`.

    Raises UserError where the hardware has no figure for a rate that this takes.
    """
    assumed = assumptions or assumptions_of(recipe)
    topology = placement.topology
    said = [attention_words(recipe, topology, assumed)] * (ATTENTION not in analysis.unrecognised)
    said += [f"{assumed.overlap:.0%} of collectives of {OVERLAPPED} pass beside matrix products; others are waited for"]
    work = work_time(analysis, placement, assumed, said, share_of_fused(recipe, analysis.layout.context))
    peak = _peak(topology, recipe.train.compute_dtype) * topology.cores
    flops = recipe.tokens_per_step * flops_per_token(recipe.model, recipe.sequence_length)
    return StepTime(**vars(work), mfu=flops / work.seconds / peak)


def attention_words(recipe: Recipe, topology: Topology, assumed: Assumptions) -> str:
    """Say how attention is timed."""
    if assumed.attention == "xla":
        scores = "" if recipe.reads_images else ", S x S,"
        return f"attention is the XLA form: its scores{scores} go through memory"
    words = "attention is a fused kernel: its scores stay on chip"
    if not recipe.reads_images:
        return f"{words}, the upper half is skipped"
    called = for_topology(topology).fuses_all_attention
    return words if called else f"{words}; here trainfw calls none for attention that is not causal"


def work_time(
    analysis: Analysis,
    placement: Placement | MeshPlacement,
    assumed: Assumptions,
    said: Sequence[str],
    of_fused: tuple[float, float] = (1.0, 1.0),
    beside: Callable[[Transfer], bool] | None = None,
) -> WorkTime:
    """The time of all that was read as `analysis`, once, on the hardware of `placement`.

    Args:
        said: what is assumed of the program, in words.
        of_fused: what a fused kernel of attention computes of a product with scores, forward and backward.
        beside: whether a collective may pass beside matrix products; left out, as a training step's do.

    Raises UserError where the hardware has no figure for a rate that this takes.
    """
    topology = placement.topology
    added_up = functools.partial(_added_up, analysis, placement, of_fused, beside or _beside)
    middle = added_up(assumed)
    slower, faster = efficiency_range(topology)
    slow = {dim.name: 0.5 for dim in topology.dims if topology.figures[f"{dim.link}.bandwidth"].doubtful}
    return replace(
        middle,
        low=min(added_up(replace(assumed, overlap=1.0), faster).seconds, middle.seconds),  # sums in another order
        high=max(added_up(replace(assumed, overlap=0.0), slower, slow).seconds, middle.seconds),
        assumptions=tuple(_words(topology, assumed, said, slow, analysis)),
    )


def efficiency_range(topology: Topology) -> tuple[float, float]:
    """Bound the rates of matrix products, as multiples of the middle, for the range of a step's time.

    As far as the published runs of the chip lie apart (`matmul_efficiency_range` over `matmul_efficiency`, of its file:
    a recipe that replaces the efficiency moves the range with it), and at least by `EFFICIENCY_SPREAD`; not at all for
    hardware that has no efficiency.
    """
    value, around = topology.chip.matmul_efficiency, topology.chip.matmul_efficiency_range
    if value is None and topology.chip.matmul_rates is None:
        return 1.0, 1.0
    slower, faster = 1 - EFFICIENCY_SPREAD, 1 + EFFICIENCY_SPREAD
    if value is not None and around is not None and topology.chip.matmul_rates is None:
        slower, faster = min(slower, around.low / value.number), max(faster, around.high / value.number)
    return slower, faster


def _added_up(
    analysis: Analysis,
    placement: Placement | MeshPlacement,
    of_fused: tuple[float, float],
    may_hide: Callable[[Transfer], bool],
    assumed: Assumptions,
    efficiency: float = 1.0,
    speed: Mapping[str, float] | None = None,
) -> WorkTime:
    """Add up one set of figures; as if it were certain."""
    topology = placement.topology
    by_kind: dict[str, defaultdict[str, float]] = {
        kind: defaultdict(float) for kind in ("products", "streamed", "collectives", "beside", "busy")
    }
    of_products, of_streamed, collectives, beside, busy = by_kind.values()
    products, on_memory = [], 0.0
    for matmul in analysis.matmuls:
        compute, streaming = _matmul_seconds(matmul, topology, assumed, efficiency, of_fused)
        products.append(max(compute, streaming))
        of_products["attention" if matmul.attention else "matmul"] += products[-1]
        on_memory += streaming if streaming > compute else 0.0
    streamed = []
    for piece in analysis.streamed:
        on_chip = assumed.attention == "fused" and piece.kind == "attention"
        streamed.append(0.0 if on_chip else piece.bytes / _elementwise_rate(topology, piece.array))
        of_streamed[piece.kind] += streamed[-1]
    transfers = [(transfer, transfer_seconds(transfer, placement, speed)) for transfer in analysis.transfers]
    busy |= {"compute": sum(of_products.values()) - on_memory, "hbm": on_memory + sum(streamed)}
    for transfer, time in transfers:
        axes = "+".join(transfer.axes)
        collectives[axes] += time.seconds * transfer.times
        if may_hide(transfer):
            beside[axes] += time.seconds * transfer.times
        for level in time.levels:
            busy[f"links.{level.dim}"] += level.seconds * transfer.times
    # No more can be hidden than there are products to hide it behind.
    wanted = assumed.overlap * sum(beside.values())
    share = assumed.overlap * min(1.0, sum(of_products.values()) / wanted) if wanted else 0.0
    hidden = {axes: seconds * share for axes, seconds in beside.items()}
    parts = {
        "matmul": of_products["matmul"],
        "attention": of_products["attention"] + of_streamed["attention"],
        "memory": of_streamed["model"],
        "optimizer": of_streamed["update"],
        **{axes: seconds - hidden.get(axes, 0.0) for axes, seconds in collectives.items()},
    }
    seconds = sum(parts.values())
    return WorkTime(
        seconds=seconds,
        low=seconds,
        high=seconds,
        parts=parts,
        hidden=hidden,
        bound_by=max(busy, key=lambda what: busy[what]),
        transfers=tuple(transfers),
        products=tuple(products),
        streamed=tuple(streamed),
        assumptions=(),
    )


def _beside(transfer: Transfer) -> bool:
    """Tell whether products run meanwhile that do not need it.

    So do those of a layer while the next one's weights come and the last one's gradients go, along whatever axes share
    them; those of a ring's turn, while it passes keys and values on; and those of a stage, while one of its two rings
    turns. What a block works on is waited for: activations over tensor, tokens to experts and back, and keys and values
    that are gathered. (Weights kept in shares over context alone look like these, and are waited for too.)
    """
    if "tensor" in transfer.axes or "all-to-all" in transfer.kind:
        return False
    return transfer.kind == "collective-permute" or transfer.axes not in (("context",), ("expert",))


def share_of_fused(recipe: Recipe, size: int = 1) -> tuple[float, float]:
    """Count what a fused kernel computes of a product with scores in the program, forward and backward.

    Where the sequence is split over n = `size` devices, the program leaves out most of what is masked itself: a ring
    computes (2n + 1) / 4n of it, and its backward pass makes the scores again as a kernel's would; with keys and values
    gathered, three quarters (see `trainfw.parallel.ring_attention`). Attention in images is not causal: all counts.
    """
    if recipe.reads_images:
        return 1.0, _FUSED_BACKWARD
    if size == 1:
        return _CAUSAL, _CAUSAL * _FUSED_BACKWARD
    if recipe.parallel.context_attention == "ring":
        return _CAUSAL / ((2 * size + 1) / (4 * size)), _CAUSAL / ((2 * size + 1) / (4 * size))
    return _CAUSAL / 0.75, _CAUSAL / 0.75 * _FUSED_BACKWARD


def _matmul_seconds(
    matmul: Matmul, topology: Topology, assumed: Assumptions, efficiency: float, of_fused: tuple[float, float]
) -> tuple[float, float]:
    """Seconds in a step on the tensor engine, and of its operands and result through memory."""
    fused = matmul.attention and assumed.attention == "fused"
    dtype = matmul.dtype
    if matmul.mixed and (fused or assumed.mixed == "narrow"):
        dtype = "bf16"
    figure = topology.figures.get("chip.matmul_efficiency")
    share = 1.0 if figure is None or topology.chip.matmul_rates is not None else figure.number
    rate = hlo_peak(topology, dtype) * share * efficiency
    flops = matmul.flops / shape_efficiency(topology, matmul.m, matmul.n, matmul.k, dtype)
    if not fused:
        return flops / rate, matmul.bytes * matmul.times / memory_rate(topology)
    return flops * of_fused[matmul.backward] / rate, 0.0


def shape_efficiency(topology: Topology, m: int, n: int, k: int, dtype: str = "bf16") -> float:
    """Share of a tensor engine's cycles that a product (m, k) x (k, n) of `dtype` makes use of, for its shape.

    Where the chip has measured rates, the share of the peak of its dtype between those of the nearest sizes.

    The contracted dim fills the rows of the array, the free dim of one operand its columns, both padded to whole
    tiles; the other operand's free dim passes through in parts, of which a short one takes the cycles of a longer.
    Either operand may be the one that stays. Loading it takes a quarter of the cycles and runs in the background.
    Source: the cost model in the chip's `tensor_engine.source`. 1 where the chip names no engine.
    """
    measured = topology.chip.matmul_rates
    rates = {} if measured is None else measured.rates
    if measured is not None and (names := [name for name in _DTYPES.get(dtype, ()) if name in rates]):
        # Linear in the logarithms of sizes and rates.
        corners = itertools.product(*(_between(measured.sizes, size) for size in (m, n, k)))
        cube = rates[names[0]]
        rate = math.exp(sum(a * b * c * math.log(cube[x][y][z]) for (x, a), (y, b), (z, c) in corners))
        return rate / topology.cores_per_chip / hlo_peak(topology, dtype)
    engine = topology.chip.tensor_engine
    if engine is None:
        return 1.0

    def padded(size: int, tile: int) -> float:
        return size / (math.ceil(size / tile) * tile)

    def passing(size: int) -> float:
        whole, rest = divmod(size, engine.moving)
        return size / (whole * engine.moving + (max(rest, engine.moving_cycles) if rest else 0))

    free = max(padded(m, engine.columns) * passing(n), padded(n, engine.columns) * passing(m))
    return padded(k, engine.rows) * free


def _between(sizes: Sequence[int], size: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """The places of the sizes below and above, and the share of each; outside of all, the nearest has all."""
    high = min(max(bisect.bisect_left(sizes, size), 1), len(sizes) - 1)
    share = math.log(max(size, 1) / sizes[high - 1]) / math.log(sizes[high] / sizes[high - 1])
    share = min(max(share, 0.0), 1.0)
    return (high - 1, 1 - share), (high, share)


def hlo_peak(topology: Topology, dtype: str) -> float:
    """Return the dense peak of a core in FLOP/s for a dtype of HLO. Raises UserError where no source gives it."""
    names = _DTYPES.get(dtype, (dtype,))
    return _peak(topology, next((name for name in names if topology.peak_flops(name) is not None), names[-1]))


def _peak(topology: Topology, dtype: str) -> float:
    peak = topology.peak_flops(dtype)
    if peak is None:
        raise UserError(f"{topology.name}: no source gives its peak in {dtype}; expected chip.peak_flops.{dtype}")
    return peak


def memory_rate(topology: Topology) -> float:
    """Return the bytes/s of a core's memory. Raises UserError where no source gives it."""
    rate = topology.hbm_bandwidth
    if rate is None:
        raise UserError(f"{topology.name}: no source gives the bandwidth of its memory; expected chip.hbm_bandwidth")
    return rate


def _elementwise_rate(topology: Topology, array: int) -> float:
    """Bytes/s of one core for kernels whose largest array has `array` bytes, or any number where that is 0."""
    measured = topology.chip.elementwise_rates
    if measured is None:
        return memory_rate(topology)
    corners = _between(measured.sizes, array or measured.sizes[-1])
    return math.exp(sum(share * math.log(measured.rates[i]) for i, share in corners)) / topology.cores_per_chip


def _words(
    topology: Topology, assumed: Assumptions, said: Sequence[str], slow: Mapping[str, float], analysis: Analysis
) -> list[str]:
    figure = topology.figures.get("chip.matmul_efficiency")
    shares = {dim.name: topology.figures.get(f"{dim.link}.efficiency") for dim in topology.dims}
    less = [f"{share.number:.0%} of it along {name}" for name, share in shares.items() if share is not None]
    measured, elementwise = topology.chip.matmul_rates, topology.chip.elementwise_rates
    products = f"reach {1 if figure is None else figure.number:.0%} of the peak"
    if figure is not None:
        low, high = (figure.number * end for end in efficiency_range(topology))
        products += f" ({figure.note or figure.source}), in the range {low:.0%} to {high:.0%}"
    products = f"matrix products of even shapes {products}"
    if measured is not None:
        products = f"matrix products run at the rates of their shapes ({measured.source})"
    rate = "full bandwidth of memory" if elementwise is None else f"rates of their sizes ({elementwise.source})"
    words = [
        products,
        *said,
        f"elementwise operations are fused into what uses them, and run at the {rate}",
        "collectives reach the full bandwidth of their links" + (f", but {', '.join(less)}" if less else ""),
    ]
    if any(matmul.mixed for matmul in analysis.matmuls):
        at = "the wider's" if assumed.mixed == "wide" else "bfloat16's"
        words.append(f"products of a float32 and a bfloat16 operand run at {at} rate")
    if slow:
        words.append(
            f"at the slow end, links along {', '.join(slow)} have half the bandwidth (their sources leave it open)"
        )
    return words
