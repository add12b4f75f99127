"""One step in order: forward and backward of every microbatch, then the update, on the streams that carry them.

The program gives the order of the phases, and where it loops over its layers that of the operations in one turn. Inside
a phase as a whole the parts are laid one after the other in no order of their own. All that a step waits for adds up to
its predicted time; what of collectives passes beside matrix products is laid beside them. A product takes the tensor
engine, also where it waits for memory to deliver its operands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from trainfw.planning.predict.step_time import StepTime
from trainfw.planning.read_step.analysis import Analysis, Phase, Transfer

PHASES: tuple[Phase, ...] = ("forward", "backward", "update")


@dataclass(frozen=True)
class Segment:
    """One piece of a stream's work, from `start` on, in seconds since its phase or turn began."""

    stream: str
    """`tensor engine`, `memory`, or the mesh axes over whose links collectives go: `tensor`, `data+fsdp`."""
    part: str
    """Name of a part of `StepTime.parts`."""
    start: float
    seconds: float
    hidden: bool = False
    """True beside matrix products, where nothing waits for it."""


@dataclass(frozen=True)
class Stretch:
    """A phase of one microbatch, the update, or one turn of a loop over layers."""

    phase: Phase
    times: int
    segments: tuple[Segment, ...]

    @property
    def seconds(self) -> float:
        """Each time, of what is waited for."""
        return sum(segment.seconds for segment in self.segments if not segment.hidden)


@dataclass(frozen=True, repr=False)
class Timeline:
    microbatches: int
    """One after the other in a step."""
    phases: tuple[Stretch, ...]
    """Forward and backward of one microbatch, then the update."""
    loops: tuple[Stretch, ...]

    def __repr__(self) -> str:
        return f"<Timeline: {self.microbatches} microbatches, {self.seconds:.3g} s a step>"

    @property
    def seconds(self) -> float:
        """Return the seconds of a step."""
        return sum(stretch.seconds * stretch.times for stretch in self.phases)


def timeline(analysis: Analysis, time: StepTime, microbatches: int) -> Timeline:
    """The step whose `analysis` was predicted to take `time`."""
    work = {
        "matmuls": [
            _Work(matmul.phase, "tensor engine", "attention" if matmul.attention else "matmul", seconds)
            for matmul, seconds in zip(analysis.matmuls, time.products, strict=True)
        ],
        "streamed": [
            _Work(streamed.phase, "memory", _PARTS[streamed.kind], seconds)
            for streamed, seconds in zip(analysis.streamed, time.streamed, strict=True)
        ],
        "transfers": [_links(transfer, taken.seconds * transfer.times, time) for transfer, taken in time.transfers],
    }
    # In a phase, streams one after the other: matrix products, memory, links.
    streams, parts = ("tensor engine", "memory"), list(time.parts)
    phases = []
    for phase in PHASES:
        times = 1 if phase == "update" else microbatches
        found = [piece.scaled(1 / times) for pieces in work.values() for piece in pieces if piece.phase == phase]
        found.sort(key=lambda w: (streams.index(w.stream) if w.stream in streams else 2, parts.index(w.part)))
        phases.append(Stretch(phase, times, tuple(_laid(found))))
    loops = [
        Stretch(loop.phase, loop.times, tuple(_laid(work[o.of][o.index].scaled(o.share) for o in loop.operations)))
        for loop in analysis.loops
    ]
    return Timeline(microbatches, tuple(phases), tuple(loops))


_PARTS = {"model": "memory", "attention": "attention", "update": "optimizer"}


@dataclass(frozen=True)
class _Work:
    phase: Phase
    stream: str
    part: str
    waited: float
    """Seconds."""
    hidden: float = 0.0
    """Seconds beside matrix products."""

    def scaled(self, share: float) -> _Work:
        return replace(self, waited=self.waited * share, hidden=self.hidden * share)


def _links(transfer: Transfer, seconds: float, time: StepTime) -> _Work:
    axes = "+".join(transfer.axes)
    hidden = time.hidden.get(axes, 0.0)
    share = hidden / (hidden + time.parts[axes]) if hidden else 0.0
    return _Work(transfer.phase, axes, axes, seconds * (1 - share), seconds * share)


def _laid(work: Iterable[_Work]) -> Iterator[Segment]:
    """Lay work that is waited for end to end, and spread the rest evenly beside matrix products."""
    hidden: defaultdict[tuple[str, str], float] = defaultdict(float)
    segments = []
    now = 0.0
    for (stream, part), run in groupby(work, key=lambda w: (w.stream, w.part)):
        pieces = list(run)
        hidden[stream, part] += sum(piece.hidden for piece in pieces)
        seconds = sum(piece.waited for piece in pieces)
        if seconds:
            segments.append(Segment(stream, part, now, seconds))
        now += seconds
    yield from segments
    products = [segment for segment in segments if segment.stream == "tensor engine"]
    places = [(product.start, product.seconds) for product in products] or [(0.0, 1.0)]
    whole = sum(length for _, length in places)
    for (stream, part), seconds in hidden.items():
        if seconds:
            yield from (Segment(stream, part, at, seconds * long / whole, hidden=True) for at, long in places)
