"""What the drawing of a step shows in order: lanes, one for each stream, over the same seconds."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from trainfw.hardware import duration

_THIN = 1e-3
"""Share of a drawing below which a lane is left out, and half of that a block: neither could be seen."""
_MOST_TURNS = 64
ON_CORES = ("tensor engine", "memory")
"""Streams that are no links."""


def step_lane(timeline: Any) -> dict[str, Any]:
    """Lay out the whole step of a `trainfw.planning.Timeline`, to scale: its microbatches, and the update."""
    forward, backward, update = (stretch.seconds for stretch in timeline.phases)
    many, at, blocks = timeline.microbatches, 0.0, []
    if many > _MOST_TURNS:
        pieces = [("backward", f"{many} x (forward, backward)", many * (forward + backward))]
    else:
        pieces = [p for turn in range(many) for p in (("forward", "", forward), ("backward", str(turn + 1), backward))]
    for phase, name, seconds in [*pieces, ("update", "", update)]:
        blocks.append(_phase(phase, name, at, seconds))
        at += seconds
    whole = ("the step", f"the step: {many} microbatches, and the update", blocks)
    return {"seconds": timeline.seconds, "lanes": [whole], "edges": []}


def lanes(stretches: Sequence[Any], colour: Callable[[str], str], label: Callable[[str], str]) -> dict[str, Any]:
    """Lay out a lane for each stream of stretches that follow each other, to scale.

    Args:
        stretches: `trainfw.planning.Stretch`es.
        colour: of a part of the step.
        label: what it is called.
    """
    *starts, whole = itertools.accumulate((stretch.seconds for stretch in stretches), initial=0.0)
    busy: defaultdict[str, float] = defaultdict(float)
    segments = []
    for stretch, at in zip(stretches, starts, strict=True):
        for segment in stretch.segments:
            busy[segment.stream] += segment.seconds
            if segment.seconds >= _THIN / 2 * whole:
                name = label(segment.part)
                beside, tip = " beside matrix products" * segment.hidden, f"{name}, {duration(segment.seconds)}"
                shown = ("hidden", "") if segment.hidden else ("", name)
                block = (*shown, f"{stretch.phase}: {tip}{beside}", at + segment.start, segment.seconds)
                segments.append((segment.stream, (*block, colour(segment.part))))
    links = [stream for stream in busy if stream not in ON_CORES and busy[stream] > _THIN * whole]
    drawn = []
    if len(stretches) > 1:
        drawn.append(("", "phases", [_phase(s.phase, s.phase, at, s.seconds) for s, at in zip(stretches, starts)]))
    for stream in (*ON_CORES, *sorted(links, key=lambda stream: -busy[stream])):
        name = stream if stream in ON_CORES else f"links: {stream.replace('+', ', ')}"
        drawn.append((name, name, [block for of, block in segments if of == stream]))
    return {"seconds": whole or 1.0, "lanes": drawn, "edges": starts[1:]}


def _phase(phase: str, name: str, start: float, seconds: float) -> tuple[str, str, str, float, float, str]:
    """Give a block's class, text, tip, start, seconds and colour."""
    text = f"{name} {duration(seconds)}" if name == phase else name
    return f"phase {phase}", text, f"{phase}: {duration(seconds)}", start, seconds, ""
