"""HTML pages that load nothing: no scripts, no fonts, no pictures but inline SVG. And such pages in a notebook."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainfw.hardware import duration, in_any_unit, in_seconds
from trainfw.report.svg import topology_svg
from trainfw.report.text import COLOURS, axes_of_dim, doubtful_figures, kind_in_words, rate_in_words

PART_COLOURS = {"matmul": "#3f66b0", "attention": "#7a8fd0", "memory": "#7d8794", "optimizer": "#a7afb9"}
"""Colours of the parts of a step. Collectives have the colour of their first axis."""

MEMORY_COLOURS = {
    "parameters": "#24508f",
    "gradients": "#4a86cc",
    "optimizer_state": "#8fbbe8",
    "activations": "#d9772b",
    "logits_and_loss": "#f0b27a",
    "collective_buffers": "#2a9d68",
    "data": "#b7841a",
    "other": "#8a94a0",
    "runtime": "#5b6672",
}
"""Blue for what the optimizer trains and keeps, orange for activations, green for collectives, grey for the rest."""

_WORDS = {"other": "other temporaries", "logits_and_loss": "predictions and loss"}
"""Words for keys that do not say it."""

_HEAT = "224, 85, 47"
_FEW = 12
_SHORT = 2e-3
"""Share of a turn of a loop below which an operation is not listed."""
_MOST_COLUMNS = 7
_GREY = "#8a94a0"


def plan_page(plan: Any, changes: Sequence[tuple[str, float]] = (), further: str = "") -> str:
    """Fill `page.html`, which is well-formed as XML too.

    Args:
        plan: a `trainfw.planning.Plan`.
        changes: what would shorten the step and by how many seconds, the best first (`trainfw.planning.whatif`).
        further: sections to put before the assumptions, such as a `scaling_section`.

    A figure of `plan.to_json()` stands in a `<data>` element with its value in full, and its key in `data-key`.
    """
    found = plan.to_json()
    filled = template("page.html").render(
        plan=plan,
        found=found,
        changes=changes,
        further=Markup(further),
        units=plan.topology.in_words,
        drawing=Markup(topology_svg(plan.topology, plan.placement)),
        links=_links(plan),
        memory_notes=[line for line in plan.memory.lines() if line.endswith(".")],  # rows of its table end with a share
        step=step_lane(plan.timeline),
        lanes=lambda stretches: lanes(stretches, _colour, plan.part_label),
        parts=sorted(found["step_time_parts_seconds"].items(), key=lambda item: -item[1]),
        transfers=[(i, *pair) for i, pair in enumerate(plan.time.longest)],
        doubts=[line.plain.rstrip() for line in doubtful_figures(plan.topology)],
    )
    return str(filled)


def findings_page(
    verdict: str, findings: Sequence[Sequence[str]], collectives: Sequence[Sequence[str]], memory: str
) -> str:
    """Fill the page of a check: tables whose first rows are their heads, and the memory of a core in lines."""
    tables = {"findings": findings, "collectives": collectives}
    return str(template("findings.html").render(verdict=verdict, memory=memory, **tables))


def framed(page: str, height: int = 560) -> str:
    """Put a page in a frame of its own, so that its style does not reach the notebook's."""
    return f'<iframe srcdoc={quoteattr(page)} style="width:100%;height:{height}px;border:0"></iframe>'


def template(file: str) -> Any:
    files = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"GIB": 2**30, "FEW": _FEW, "SHORT": _SHORT, "ON_CORES": ON_CORES}
    for function in (duration, in_seconds, in_any_unit, _percent, _size, _hours, _colour, _heat_colour, _bound):
        made.globals[function.__name__.lstrip("_")] = function
    made.globals["memory_colour"] = lambda key: MEMORY_COLOURS.get(key, _GREY)
    made.globals["words"] = lambda key: _WORDS.get(key, key.replace("_", " "))
    return made.get_template(file)


def _links(plan: Any) -> dict[str, Any]:
    """Tabulate physical dims by collectives: the share of a step for which the dim's links carry each one's data."""
    busy: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    weight: defaultdict[str, float] = defaultdict(float)
    for transfer, taken in plan.time.longest:
        name = f"{transfer.kind} over {', '.join(transfer.axes)}"
        for level in taken.levels:
            share = level.seconds * transfer.times / plan.time.seconds
            busy[level.dim][name] += share
            weight[name] += share
    order = sorted(weight, key=lambda name: -weight[name])
    shown, rest = order[:_MOST_COLUMNS], order[_MOST_COLUMNS:]
    dims = []
    for dim in (dim for dim in plan.topology.dims if dim.size > 1):
        shares = [busy[dim.name][name] for name in shown]
        if rest:
            shares.append(sum(busy[dim.name][name] for name in rest))
        about = f"{kind_in_words(dim)}, {rate_in_words(dim)}"
        dims.append((dim.name, about, axes_of_dim(plan.placement, dim.name), shares, sum(busy[dim.name].values())))
    return {"heads": [*shown, *([f"{len(rest)} others"] if rest else [])], "dims": dims}


def _colour(key: str) -> str:
    """Choose the colour of an axis or of a part of a step; a collective has that of its first axis."""
    return PART_COLOURS.get(key) or COLOURS.get(key.split("+")[0], _GREY)


def _heat_colour(share: float) -> str:
    """Shade by the square root, so that a few per cent show."""
    return f"rgba({_HEAT}, {0.08 + 0.84 * math.sqrt(min(1.0, share)):.3f})"


_BOUND = {"compute": ("compute", "matrix products at their rate"), "hbm": ("HBM", "the bandwidth of device memory")}


def _bound(what: str) -> tuple[str, str]:
    """Name what bounds a step, and say what it is."""
    return _BOUND.get(what, (f"{what.removeprefix('links.')} links", "the dim whose links take longest"))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


def _size(size: float) -> str:
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale / 10:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,} B"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


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
