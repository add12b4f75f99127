"""The drawing of a step in order: lanes of HTML, one for each stream, over the same seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from trainfw.hardware import duration

_THIN = 1e-3
"""Share of a drawing below which a lane is left out, and half of that a block: neither could be seen."""
_MOST_TURNS = 64
ON_CORES = ("tensor engine", "memory")
"""Streams that are no links."""


def step_lane(timeline: Any) -> Iterator[str]:
    """Draw the whole step, to scale: its microbatches, and the update.

    Args:
        timeline: a `trainfw.planning.Timeline`.
    """
    forward, backward, update = (stretch.seconds for stretch in timeline.phases)
    many, at, blocks = timeline.microbatches, 0.0, []
    if many > _MOST_TURNS:
        pieces = [("backward", f"{many} x (forward, backward)", many * (forward + backward))]
    else:
        pieces = [p for turn in range(many) for p in (("forward", "", forward), ("backward", str(turn + 1), backward))]
    for phase, name, seconds in [*pieces, ("update", "", update)]:
        blocks.append(_phase(phase, name, at, seconds, timeline.seconds))
        at += seconds
    yield _lane("the step", blocks, f"the step: {many} microbatches, and the update")
    yield _ticks(timeline.seconds)


def lanes(stretches: Sequence[Any], colour: Callable[[str], str], label: Callable[[str], str]) -> Iterator[str]:
    """Draw a lane for each stream of stretches that follow each other, to scale.

    Args:
        stretches: `trainfw.planning.Stretch`es.
        colour: of a part of the step.
        label: what it is called.
    """
    whole = sum(stretch.seconds for stretch in stretches) or 1.0
    starts = [sum(stretch.seconds for stretch in stretches[:i]) for i in range(len(stretches))]
    if len(stretches) > 1:
        heads = [_phase(s.phase, s.phase, at, s.seconds, whole) for s, at in zip(stretches, starts, strict=True)]
        yield _lane("", heads, "phases")
    edges = "".join(f'<u style="left:{100 * at / whole:.3f}%"></u>' for at in starts[1:])
    for stream in _streams(stretches, whole):
        blocks = []
        for stretch, at in zip(stretches, starts, strict=True):
            for segment in stretch.segments:
                if segment.stream != stream or segment.seconds < _THIN / 2 * whole:
                    continue
                name = label(segment.part)
                tip = f"{stretch.phase}: {name}, {duration(segment.seconds)}"
                tip += " beside matrix products" if segment.hidden else ""
                kind = ' class="hidden"' if segment.hidden else ""
                blocks.append(
                    f"<i{kind} title={quoteattr(tip)} "
                    f'style="{_at(at + segment.start, segment.seconds, whole)};background:{colour(segment.part)}">'
                    f"{_if_room('' if segment.hidden else name, segment.seconds / whole)}</i>"
                )
        name = stream if stream in ON_CORES else f"links: {stream.replace('+', ', ')}"
        yield _lane(name, [*blocks, edges], name)
    yield _ticks(whole)


def _streams(stretches: Iterable[Any], whole: float) -> list[str]:
    """List the streams: those of the cores, then those of the links, the busiest first."""
    busy: defaultdict[str, float] = defaultdict(float)
    for stretch in stretches:
        for segment in stretch.segments:
            busy[segment.stream] += segment.seconds
    links = sorted((stream for stream in busy if stream not in ON_CORES), key=lambda stream: -busy[stream])
    return [*ON_CORES, *(stream for stream in links if busy[stream] > _THIN * whole)]


def _lane(name: str, blocks: Iterable[str], label: str) -> str:
    track = f'<div class="track" role="img" aria-label={quoteattr(label)}>{"".join(blocks)}</div>'
    return f'<div class="lane"><span>{escape(name)}</span>{track}</div>'


def _phase(phase: str, name: str, start: float, seconds: float, whole: float) -> str:
    tip = quoteattr(f"{phase}: {duration(seconds)}")
    text = _if_room(f"{name} {duration(seconds)}" if name == phase else name, seconds / whole)
    return f'<i class="phase {phase}" title={tip} style="{_at(start, seconds, whole)}">{text}</i>'


def _at(start: float, seconds: float, whole: float) -> str:
    return f"left:{100 * start / whole:.3f}%;width:{100 * seconds / whole:.3f}%"


def _if_room(text: str, share: float) -> str:
    """Return the text, or nothing where it is wider than the block: a character takes some 7 of 1,070 pixels."""
    return escape(text) if share * 150 > len(text) else ""


def _ticks(whole: float) -> str:
    marks = "".join(f"<span>{duration(whole * share)}</span>" for share in (0, 0.25, 0.5, 0.75, 1))
    return f'<div class="lane"><span></span><div class="ticks">{marks}</div></div>'
