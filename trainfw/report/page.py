"""A plan as one HTML page that loads nothing: no scripts, no fonts, no pictures but inline SVG."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from trainfw.hardware import duration
from trainfw.report.svg import topology_svg
from trainfw.report.text import amount, doubtful_figures
from trainfw.report.timeline import ON_CORES, STYLE, lanes, step_lane
from trainfw.report.where import COLOURS, axes_of_dim, kind_in_words

PART_COLOURS = {"matmul": "#3f66b0", "attention": "#7a8fd0", "memory": "#7d8794", "optimizer": "#a7afb9"}
"""Of the parts of a step that are not collectives; those have the colour of their first axis."""

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

_HEAT = "224, 85, 47"
_GIB = 2**30
_FEW = 12
_SHORT = 2e-3
"""Of a turn of a loop: what takes less is not listed."""
_MOST_COLUMNS = 7

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1f2328; --quiet: #59636e; --line: #d9dfe5;
  --soft: #f3f5f8; --phase: #bcc6d0; --accent: #b4431f }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --quiet: #9aa5b1; --line: #303843;
  --soft: #161d26; --phase: #4a5563; --accent: #f0865f } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Helvetica, Arial, sans-serif; font-variant-numeric: tabular-nums }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 48px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 } h2 { font-size: 18px; margin: 44px 0 12px }
h3 { font-size: 15px; margin: 26px 0 10px }
p { margin: 8px 0 } small, .muted { color: var(--quiet) } small { font-size: 13px }
.prediction { display: inline-block; margin: 12px 0 0; padding: 3px 12px; border-left: 4px solid var(--accent);
  background: var(--soft); font-weight: 600 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-top: 20px }
.tile { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px }
.tile span { display: block; color: var(--quiet); font-size: 13px }
.tile b { display: block; font-size: 24px; line-height: 1.3 }
.span { position: relative; height: 6px; margin: 8px 0 4px; border-radius: 3px; background: var(--line) }
.span i { position: absolute; top: -4px; width: 3px; height: 14px; border-radius: 2px; background: var(--accent) }
.stack { display: flex; height: 30px; border-radius: 5px; overflow: hidden; background: var(--soft);
  box-shadow: inset 0 0 0 1px var(--line) }
.stack i { flex: none; height: 100%; font: 600 12px/30px system-ui, sans-serif; color: #fff; text-align: center;
  overflow: hidden; white-space: nowrap; box-shadow: inset -1px 0 0 var(--page) }
.ticks { display: flex; justify-content: space-between; color: var(--quiet); font-size: 12px }
.over { color: var(--accent); font-weight: 600 }
table { border-collapse: collapse; margin: 14px 0 0; width: 100% } .narrow { width: auto; min-width: 560px }
th { text-align: left; color: var(--quiet); font-weight: 500; font-size: 13px; vertical-align: bottom }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right } tr.sum td { font-weight: 600 }
tr.extra td { color: var(--quiet) }
td.heat { text-align: right; padding: 8px 12px; border: 2px solid var(--page); border-radius: 4px; min-width: 74px }
.heatmap td, .heatmap th { border-bottom-width: 2px; border-bottom-color: var(--page) }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
  vertical-align: -1px } .axis { white-space: nowrap; margin-right: 10px }
.gain { display: grid; grid-template-columns: 56px 170px 1fr; gap: 12px; align-items: center; margin: 6px 0 }
.gain i { display: block; height: 12px; border-radius: 3px; background: #2a9d68 }
.wide { overflow-x: auto } .drawing svg { max-width: 100%; height: auto; display: block }
.scale { display: inline-block; width: 160px; height: 10px; border-radius: 3px; vertical-align: middle; margin: 0 8px }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
summary { cursor: pointer; color: var(--quiet); margin-top: 12px } li { margin: 3px 0 }
@media print { details > * { display: block } main { max-width: none } }
@media (max-width: 700px) { .lane, .gain { grid-template-columns: 1fr; gap: 2px } .narrow { min-width: 0 } }
"""
_LOADS_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def plan_page(plan: Any, changes: Sequence[tuple[str, float]] = (), further: str = "") -> str:
    """The page, as text: well-formed as XML too.

    Args:
        plan: a `trainfw.planning.Plan`.
        changes: what would shorten the step and by how many seconds, the best first (`trainfw.planning.whatif`).
        further: sections to put before the assumptions, such as a `scaling_section`.

    A figure of `plan.to_json()` stands in a `<data>` element with its value in full, and its key in `data-key`.
    """
    found = plan.to_json()
    sections = [
        *_headline(plan, found),
        *_where_it_lies(plan),
        *_links(plan),
        *_memory(plan, found),
        *_time(plan, found),
        *_collectives(plan),
        *_changes(plan, changes),
        further,
        *_assumptions(plan, found),
        "<h2>The recipe</h2>",
        f"<details><summary>{_text(plan.recipe.name)}, every key written out</summary>",
        f"<pre>{_text(plan.recipe.to_yaml())}</pre></details>",
    ]
    title = f"{plan.recipe.name} on {_units(plan.topology)}: the plan"
    head = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>',
        f'<meta http-equiv="Content-Security-Policy" content={quoteattr(_LOADS_NOTHING)}/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        '<link rel="icon" href="data:,"/>',
        f"<title>{_text(title)}</title><style>{STYLE}{_STYLE}</style></head><body><main>",
    ]
    return "\n".join([*head, *sections, "</main></body></html>", ""])


# Sections -----------------------------------------------------------------------------------------------------------


def _headline(plan: Any, found: Mapping[str, Any]) -> Iterator[str]:
    topology, time = plan.topology, plan.time
    yield f"<h1>{_text(plan.recipe.name)} on {_text(_units(topology))}</h1>"
    yield f'<p class="muted">{topology.chips:,} chips, {topology.cores:,} cores; {_text(str(plan.layout))}</p>'
    yield from (f'<p class="prediction">{_text(text)}</p>' for text in (plan.caveat, *plan.unrecognised))
    yield '<div class="tiles">'
    low, high = found["step_time_range_seconds"]
    where = 100 * (time.seconds - low) / (high - low) if high > low else 50.0
    ends = (
        f"{_figure('step_time_range_seconds.0', low, duration(low))} to "
        f"{_figure('step_time_range_seconds.1', high, duration(high))}"
    )
    step = _figure("step_time_seconds", time.seconds, duration(time.seconds))
    yield _tile("step time", step, f'<div class="span"><i style="left:{where:.1f}%"></i></div>from {ends}')
    rate = found["tokens_per_second"]
    each = f"{rate / topology.chips:,.0f} a chip; {found['tokens_per_step']:,} a step"
    yield _tile("tokens/s", _figure("tokens_per_second", rate, f"{rate:,.0f}"), each)
    if found["mfu"] is not None:
        dtype = plan.recipe.train.compute_dtype
        yield _tile("MFU", _figure("mfu", found["mfu"], f"{found['mfu']:.1%}"), f"of the dense peak in {dtype}")
    yield _tile("bound by", _figure("bound_by", found["bound_by"], _bound(time.bound_by)), _about_bound(time.bound_by))
    if plan.layout.pipeline > 1:
        share = _figure("pipeline_bubble", plan.bubble, f"{plan.bubble:.1%}")
        yield _tile("pipeline bubble", share, "of a stage's iterations, in the step time")
    total, capacity = found["memory_bytes_per_core"]["total"], found["memory_capacity_bytes_per_core"]
    held = "of a core" if capacity is None else f"of {capacity / _GIB:.3g} GiB a core, {total / capacity:.0%}"
    if capacity is not None and total > capacity:
        held = f'<span class="over">does not fit: {held}</span>'
    yield _tile("memory", _figure("memory_bytes_per_core.total", total, f"{total / _GIB:.2f} GiB"), held)
    steps = plan.recipe.train.steps
    cost = f"{steps:,} steps, {plan.tokens_per_step * steps / 1e9:,.1f}G tokens"
    if found["dollars"] is not None:
        cost += "; " + _figure("dollars", found["dollars"], f"${found['dollars']:,.0f}")
    yield _tile("chip-hours of the run", _figure("chip_hours", found["chip_hours"], _hours(found["chip_hours"])), cost)
    yield "</div>"


def _where_it_lies(plan: Any) -> Iterator[str]:
    yield "<h2>Where the mesh lies on the hardware</h2>"
    yield f'<div class="drawing">{topology_svg(plan.topology, plan.placement)}</div>'


def _links(plan: Any) -> Iterator[str]:
    """Physical dims by collectives; a cell is the share of a step for which the dim's links carry data."""
    busy: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    weight: defaultdict[str, float] = defaultdict(float)
    for transfer, taken in plan.transfers:
        name = f"{transfer.kind} over {', '.join(transfer.axes)}"
        for level in taken.levels:
            share = level.seconds * transfer.times / plan.time.seconds
            busy[level.dim][name] += share
            weight[name] += share
    dims = [dim for dim in plan.topology.dims if dim.size > 1]
    if not dims:
        return
    order = sorted(weight, key=lambda name: -weight[name])
    shown, rest = order[:_MOST_COLUMNS], order[_MOST_COLUMNS:]
    yield "<h2>How busy the links are</h2>"
    yield (
        "<p>Share of a step for which the links along each physical dim carry data, whether or not a core waits for "
        "them; without latency.</p>"
    )
    heads = [*shown, *([f"{len(rest)} others"] if rest else [])]
    yield '<div class="wide"><table class="heatmap"><thead><tr><th>links along</th><th>carry</th>'
    yield "".join(f'<th class="n">{_text(head)}</th>' for head in heads) + '<th class="n">busy</th></tr></thead><tbody>'
    for dim in dims:
        shares = [busy[dim.name][name] for name in shown]
        if rest:
            shares.append(sum(busy[dim.name][name] for name in rest))
        total = sum(busy[dim.name].values())
        per = {"chip": "core", "ring": "link", "line": "link"}.get(dim.kind, "chip")
        about = f"{kind_in_words(dim)}, {amount(dim.bandwidth, 'B/s')} a {per}"
        axes = "".join(map(_axis, axes_of_dim(plan.placement, dim.name))) or "&#8212;"
        yield f"<tr><td><b>{_text(dim.name)}</b><br/><small>{_text(about)}</small></td><td>{axes}</td>"
        yield "".join(_heat(share, _text(_percent(share)) if share else "") for share in shares)
        yield _heat(total, f"<b>{_figure(f'links.{dim.name}', total, _percent(total))}</b>") + "</tr>"
    yield "</tbody></table></div>"
    stops = ", ".join(f"rgba({_HEAT}, {_alpha(share):.2f}) {100 * share:.0f}%" for share in (0, 0.1, 0.25, 0.5, 1))
    gradient = f'<span class="scale" style="background:linear-gradient(90deg, {stops})"></span>'
    yield f"<p><small>0%{gradient}100% of a step</small></p>"


def _memory(plan: Any, found: Mapping[str, Any]) -> Iterator[str]:
    sizes = {key: size for key, size in found["memory_bytes_per_core"].items() if key != "total"}
    total, capacity = found["memory_bytes_per_core"]["total"], found["memory_capacity_bytes_per_core"]
    whole = max(total, capacity or 0) or 1
    yield "<h2>Memory of a core</h2>"
    bar = [(_words(key), size / whole, MEMORY_COLOURS.get(key, "#8a94a0")) for key, size in sizes.items()]
    yield _stack(bar, label=f"{total / _GIB:.2f} GiB" + (f" of {capacity / _GIB:.2f} GiB" if capacity else ""))
    if capacity is not None and total > capacity:
        short = (total - capacity) / _GIB
        yield f'<p class="over">{short:.2f} GiB more than the {capacity / _GIB:.2f} GiB that a core has</p>'
    elif capacity is not None:
        yield f'<div class="ticks"><span>0</span><span>{capacity / _GIB:.2f} GiB, all that a core has</span></div>'
    share_of = "of the capacity" if capacity else "of the total"
    yield '<table class="narrow"><thead><tr><th>what</th><th class="n">bytes</th><th class="n">GiB</th>'
    yield f'<th class="n">{share_of}</th></tr></thead><tbody>'
    for key, size in sizes.items():
        value = _figure(f"memory_bytes_per_core.{key}", size, f"{size:,}")
        swatch = _swatch(MEMORY_COLOURS.get(key, "#8a94a0"))
        yield _row([f"{swatch}{_text(_words(key))}", value, f"{size / _GIB:.2f}", f"{size / (capacity or whole):.1%}"])
    whole_value = _figure("memory_bytes_per_core.total", total, f"{total:,}")
    yield _row(["total", whole_value, f"{total / _GIB:.2f}", f"{total / (capacity or whole):.1%}"], "sum")
    if capacity is not None:
        left = int(capacity) - total
        yield _row(["headroom", f"{left:,}", f"{left / _GIB:.2f}", f"{left / capacity:.1%}"], "extra")
    yield "</tbody></table>"
    for line in plan.memory.lines():
        if line.endswith("."):  # Rows of the table end with a share.
            yield f"<p><small>{_text(line)}</small></p>"
    if plan.memory.largest:
        yield f"<details><summary>The {len(plan.memory.largest[:_FEW])} largest temporaries at the peak</summary>"
        yield '<div class="wide"><table><thead><tr><th>for</th><th class="n">MiB</th><th>dims</th><th>made by</th>'
        yield "<th>at</th></tr></thead><tbody>"
        for value in plan.memory.largest[:_FEW]:
            dims = " x ".join(map(str, value.dims))
            cells = [_text(_words(value.category)), f"{value.bytes / 2**20:,.1f}", _text(dims)]
            made = _text(value.op_name.rpartition("/")[2]), _text(value.place.rpartition("/")[2])
            yield _row([*cells, *made], right=(1,))
        yield "</tbody></table></div></details>"


def _time(plan: Any, found: Mapping[str, Any]) -> Iterator[str]:
    time, timeline = plan.time, plan.timeline
    many = timeline.microbatches
    phases = f"{many} times forward and backward" if many > 1 else "Forward, backward"
    yield "<h2>Where a step goes</h2>"
    yield (
        f"<p>{phases}, then the update: the order of the phases is the program's. Inside a phase there is none: what a "
        "core waits for is laid one after the other, stream by stream. Faint is what passes beside matrix products, "
        "so that no core waits for it; it is spread over them evenly.</p>"
    )
    if many > 1:
        yield from step_lane(timeline)
        yield f"<h3>One microbatch of {many}, and the update</h3>"
    yield from lanes(timeline.phases, _colour, plan.part_label)
    yield from _phases(timeline.phases, found["step_time_phases_seconds"])
    yield '<table class="narrow"><thead><tr><th>what</th><th class="n">a step</th><th class="n">share</th>'
    yield '<th class="n">beside matrix products</th></tr></thead><tbody>'
    for key, seconds in sorted(found["step_time_parts_seconds"].items(), key=lambda item: -item[1]):
        value = _figure(f"step_time_parts_seconds.{key}", seconds, duration(seconds))
        more = duration(time.hidden[key]) if time.hidden.get(key) else ""
        label = _swatch(_colour(key)) + _text(plan.part_label(key))
        yield _row([label, value, _text(_percent(seconds / time.seconds)), more])
    beside = sum(time.hidden.values())
    whole = _figure("step_time_seconds", time.seconds, duration(time.seconds))
    yield _row(["total", whole, "100%", duration(beside) if beside else ""], "sum")
    yield "</tbody></table>"
    yield from _turns(plan)


def _phases(phases: Sequence[Any], in_a_step: Mapping[str, float]) -> Iterator[str]:
    yield '<table class="narrow"><thead><tr><th>phase</th><th class="n">each</th><th class="n">times</th>'
    yield '<th class="n">a step</th><th class="n">share</th></tr></thead><tbody>'
    whole = sum(in_a_step.values())
    for stretch in phases:
        seconds = in_a_step[stretch.phase]
        value = _figure(f"step_time_phases_seconds.{stretch.phase}", seconds, duration(seconds))
        share = _text(_percent(seconds / whole))
        yield _row([stretch.phase, duration(stretch.seconds), f"{stretch.times:,}", value, share])
    yield "</tbody></table>"


def _turns(plan: Any) -> Iterator[str]:
    """One turn of each loop over layers, drawn and as a table."""
    if not plan.timeline.loops:
        yield "<p><small>This program has no loop over layers, of which to show one turn in order.</small></p>"
        return
    yield "<h3>One turn of the loop over layers, in order</h3>"
    yield (
        "<p>In the order in which the program lists its operations, each after what it needs; the device's compiler "
        "may choose another such order.</p>"
    )
    for loop in plan.timeline.loops:
        yield f"<p><b>{loop.phase}</b> {duration(loop.seconds)}, {loop.times:,} times a step</p>"
        yield from lanes([loop], _colour, plan.part_label)
        waited = [segment for segment in loop.segments if not segment.hidden]
        shown = [segment for segment in waited if segment.seconds >= _SHORT * loop.seconds]
        yield f"<details><summary>{loop.phase}, as a table</summary>"
        yield '<table class="narrow"><thead><tr><th>what</th><th>on</th><th class="n">from</th>'
        yield '<th class="n">takes</th></tr></thead><tbody>'
        for segment in shown:
            what = _swatch(_colour(segment.part)) + _text(plan.part_label(segment.part))
            on = segment.stream if segment.stream in ON_CORES else "links"
            yield _row([what, on, duration(segment.start), duration(segment.seconds)], right=(2, 3))
        rest = loop.seconds - sum(segment.seconds for segment in shown)
        if len(waited) > len(shown):
            yield _row(
                [f"{len(waited) - len(shown)} shorter ones between them", "", "", duration(rest)], "extra", (2, 3)
            )
        yield "</tbody></table></details>"


def _collectives(plan: Any) -> Iterator[str]:
    if not plan.transfers:
        return
    yield "<h2>Collectives</h2>"
    head = (
        '<div class="wide"><table><thead><tr><th>kind</th><th>in</th><th>over</th><th>dtype</th>'
        '<th class="n">buffer</th><th class="n">times</th><th class="n">each</th><th class="n">a step</th>'
        "<th>slowest links</th><th>algorithm</th></tr></thead><tbody>"
    )
    yield head
    for i, (transfer, taken) in enumerate(plan.transfers):
        if i == _FEW:
            yield "</tbody></table></div>"
            yield f"<details><summary>and {len(plan.transfers) - i} more that take less</summary>{head}"
        slowest = max(taken.levels, key=lambda level: level.seconds).part if taken.levels else ""
        cells = [
            transfer.kind,
            transfer.phase,
            "".join(map(_axis, transfer.axes)),
            transfer.dtype,
            _figure(f"collectives.{i}.bytes", transfer.bytes, _size(transfer.bytes)),
            _figure(f"collectives.{i}.times", transfer.times, f"{transfer.times:,}"),
            _figure(f"collectives.{i}.seconds", taken.seconds, duration(taken.seconds)),
            duration(taken.seconds * transfer.times),
            _text(slowest),
            _text(taken.algorithm),
        ]
        yield _row(cells, right=(4, 5, 6, 7))
    yield "</tbody></table></div>" + ("</details>" if len(plan.transfers) > _FEW else "")
    yield "<p><small>The whole buffer: what an all-gather returns, what a reduce-scatter takes.</small></p>"


def _changes(plan: Any, changes: Sequence[tuple[str, float]]) -> Iterator[str]:
    if not changes:
        return
    yield "<h2>What would help most</h2>"
    yield "<p>Predicted by the same model of time, each alone; what it does to memory is for another plan to say.</p>"
    most = changes[0][1]
    for text, saved in changes:
        bar = f'<i style="width:{100 * saved / most:.1f}%"></i>'
        after = f"{duration(plan.time.seconds - saved)} a step"
        yield f'<div class="gain"><b>&#8722;{_text(_percent(saved / plan.time.seconds))}</b>{bar}'
        yield f"<span>{_text(text)} <small>({after})</small></span></div>"


def _assumptions(plan: Any, found: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>What was assumed</h2><ul>"
    yield from (f"<li>{_text(text)}</li>" for text in found["assumptions"])
    yield "</ul>"
    doubts = [line.plain.rstrip() for line in doubtful_figures(plan.topology)]
    if doubts:
        yield f"<details><summary>{_text(doubts[0])}</summary><pre>{_text(chr(10).join(doubts[1:]))}</pre></details>"


# Elements -----------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return escape(text)


def _figure(key: str, value: float | str, text: str) -> str:
    """A figure to be read by people, with the value in full beside it."""
    return f"<data data-key={quoteattr(key)} value={quoteattr(str(value))}>{_text(text)}</data>"


def _tile(name: str, value: str, about: str) -> str:
    return f'<div class="tile"><span>{name}</span><b>{value}</b><small>{about}</small></div>'


def _row(cells: Sequence[str], kind: str = "", right: Iterable[int] | None = None) -> str:
    """A row of a table; all cells but the first are numbers, or those that `right` names."""
    numbers = set(range(1, len(cells)) if right is None else right)
    columns = "".join(
        f'<td class="n">{cell}</td>' if i in numbers else f"<td>{cell}</td>" for i, cell in enumerate(cells)
    )
    return f'<tr class="{kind}">{columns}</tr>' if kind else f"<tr>{columns}</tr>"


def _stack(parts: Iterable[tuple[str, float, str]], label: str) -> str:
    """A bar of (name, share of its width, colour)."""
    segments = []
    for name, share, colour in parts:
        if share > 0:
            tip = quoteattr(f"{name}: {_percent(share)}")
            shown = _text(name) if share * 130 > len(name) else ""
            segments.append(f'<i title={tip} style="width:{100 * share:.3f}%;background:{colour}">{shown}</i>')
    return f'<div class="stack" role="img" aria-label={quoteattr(label)}>{"".join(segments)}</div>'


def _heat(share: float, text: str) -> str:
    colour = f' style="background:rgba({_HEAT}, {_alpha(share):.3f})"' if share else ""
    return f'<td class="heat"{colour}>{text}</td>'


def _alpha(share: float) -> float:
    """Of the square root, so that a few per cent show."""
    return 0.08 + 0.84 * math.sqrt(min(1.0, share))


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _axis(axis: str) -> str:
    return f'<span class="axis">{_swatch(COLOURS.get(axis, "#8a94a0"))}{_text(axis)}</span>'


# Words --------------------------------------------------------------------------------------------------------------


def _units(topology: Any) -> str:
    return f"{topology.count} x {topology.name}" if topology.count > 1 else topology.name


def _words(key: str) -> str:
    return "other temporaries" if key == "other" else key.replace("_", " ")


def _colour(key: str) -> str:
    """Of a part of a step; collectives have that of their first axis."""
    return PART_COLOURS.get(key) or COLOURS.get(key.split("+")[0], "#8a94a0")


def _bound(what: str) -> str:
    return {"hbm": "HBM"}.get(what, f"{what.removeprefix('links.')} links" if what.startswith("links.") else what)


def _about_bound(what: str) -> str:
    return {"compute": "matrix products at their rate", "hbm": "the bandwidth of device memory"}.get(
        what, "the dim whose links take longest"
    )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


def _size(size: float) -> str:
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale / 10:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,} B"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
