"""Scaling curves, and what failures leave of them: a section for the page of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from trainfw.hardware import in_any_unit, in_seconds

_COLOURS = {"weak": "#3f66b0", "strong": "#d9772b", "goodput": "#2a9d68", "alone": "#b7841a"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 64, 132, 16, 44
_GIB = 2**30
Point = tuple[float, float]


def scaling_section(scaling: Any) -> str:
    """Write the section of a `trainfw.planning.Scaling`, well-formed as XML, in the page's own style.

    A figure of `scaling.to_json()` stands in a `<data>` element with its value in full, and its key in `data-key`.
    """
    return "\n".join(_section(scaling, scaling.to_json()))


def _section(scaling: Any, found: dict[str, Any]) -> Iterator[str]:
    weak, strong, unit = found["scaling"]["weak"], found["scaling"]["strong"], found["scaling"]["unit"]
    goodput = found["goodput"]["weak"]
    yield "<h2>Scaling, and what failures leave of it</h2>"
    yield (
        f"<p>More units of {escape(unit)}, hence more replicas. Weak: the global batch grows with them. Strong: it "
        f"stays at {scaling.recipe.train.global_batch_size:,} sequences. Goodput, days and cost are those of the run "
        f"of {scaling.tokens / 1e9:,.1f}G tokens with failures, with checkpoints at the suggested interval and "
        "the best number of spares. All of it is predicted.</p>"
    )
    yield '<div style="display:flex;flex-wrap:wrap;gap:8px 32px">'
    yield _throughput({"weak": _planned(weak), "strong": _planned(strong)})
    if goodput:
        yield _shares(_planned(weak), goodput)
    yield "</div>"
    for name, rows in (("weak", weak), ("strong", strong)):
        yield from _rows(name, rows)
    if goodput:
        yield from _goodput(_planned(weak), goodput)
    yield "<details><summary>What was assumed of many units, failures and storage</summary><ul>"
    yield from (f"<li>{escape(text)}</li>" for text in found["goodput"]["assumptions"])
    yield "</ul></details>"


def _planned(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    return [row for row in rows if row["problem"] is None]


# Tables -------------------------------------------------------------------------------------------------------------


def _rows(name: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    priced = any(row.get("dollars") is not None for row in rows)
    cost = "dollars_with_failures" if priced else "chip_hours_with_failures"
    heads = ["units", "chips", "replicas", "global batch", "step", "tokens/s", "MFU", "efficiency", "memory of a core"]
    heads += ["waits for data", "goodput", "days", "dollars" if priced else "chip-hours", "bound by"]
    swatch = f'<span class="swatch" style="background:{_COLOURS[name]}"></span>'
    yield f'<p style="margin-top:24px">{swatch}<b>{name.capitalize()} scaling</b></p>'
    yield '<div class="wide"><table style="white-space:nowrap"><thead><tr>'
    yield "".join(f'<th class="n">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for i, row in enumerate(rows):
        if row["problem"] is not None:
            problem = f'<td colspan="{len(heads) - 1}" class="muted" style="padding-left:14px;white-space:normal">'
            yield f'<tr><td class="n">{row["count"]:,}</td>{problem}{escape(row["problem"])}</td></tr>'
            continue
        key = f"scaling.{name}.{i}"
        held, capacity = row["memory_bytes_per_core"], row["memory_capacity_bytes_per_core"]
        over = ' class="over"' if capacity is not None and held > capacity else ""
        cells = [
            f"{row['count']:,}",
            f"{row['chips']:,}",
            f"{row['data']:,}",
            f"{row['global_batch_size']:,}",
            _data(f"{key}.step_time_seconds", row["step_time_seconds"], in_seconds),
            _data(f"{key}.tokens_per_second", row["tokens_per_second"], "{:,.0f}".format),
            _data(f"{key}.mfu", row["mfu"], "{:.1%}".format),
            _data(f"{key}.efficiency", row["efficiency"], "{:.1%}".format),
            f"<span{over}>{_data(f'{key}.memory_bytes_per_core', held, lambda size: f'{size / _GIB:.1f} GiB')}</span>",
            _data(f"{key}.data_share", row["data_share"], "{:.1%}".format),
            _data(f"{key}.goodput", row["goodput"], "{:.1%}".format),
            f"{row['days'] / row['goodput'] if row['goodput'] else math.inf:,.2f}",
            _data(f"{key}.{cost}", row[cost], "{:,.0f}".format),
            escape(row["bound_by"]),
        ]
        yield "<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"
    yield "</tbody></table></div>"


def _goodput(rows: Sequence[dict[str, Any]], goodput: Sequence[dict[str, Any]]) -> Iterator[str]:
    heads = ["units", "fails every", "restart", "of it, reading", "a checkpoint stalls", "best interval", "every"]
    heads += ["goodput", "suggested", "goodput", "a spare buys", "best spares", "goodput"]
    size = goodput[0]["state_bytes"] / 1e9
    yield '<p style="margin-top:24px"><b>Goodput with failures</b>, weak scaling</p>'
    yield (
        f"<p><small>A checkpoint is {size:,.0f} GB. Every and suggested: checkpoint.every, in steps. Best spares: most "
        f"work a rented chip, spares included.</small></p>"
    )
    yield '<div class="wide"><table style="white-space:nowrap"><thead><tr>'
    yield "".join(f'<th class="n">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for i, (row, one) in enumerate(zip(rows, goodput, strict=True)):
        key = f"goodput.weak.{i}"
        gain = one["first_spare_gain"]
        cells = [
            f"{row['count']:,}",
            _data(f"{key}.mtbf_seconds", one["mtbf_seconds"], in_any_unit),
            _data(f"{key}.restart_seconds", one["restart_seconds"], in_any_unit),
            _data(f"{key}.read_seconds", one["read_seconds"], in_any_unit),
            _data(f"{key}.copy_seconds", one["copy_seconds"], in_seconds),
            _data(f"{key}.daly_interval_seconds", one["daly_interval_seconds"], in_any_unit),
            f"{one['checkpoint_every']:,}" if one["checkpoint_every"] else "end",
            _data(f"{key}.goodput_at_checkpoint_every", one["goodput_at_checkpoint_every"], "{:.1%}".format),
            _data(f"{key}.suggested_checkpoint_every", one["suggested_checkpoint_every"], "{:,}".format),
            _data(f"{key}.goodput_at_suggested", one["goodput_at_suggested"], "{:.1%}".format),
            f"+{gain:.1%}" if gain < 10 else f"{gain + 1:,.0f} x",
            f"{one['best_spares']:,}",
            f"{row['goodput']:.1%}",
        ]
        yield "<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"
    yield "</tbody></table></div>"


# Curves -------------------------------------------------------------------------------------------------------------


def _throughput(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Draw tokens/s by chips, both logarithmic, with the line that the fewest chips promise."""
    points = {
        name: [(float(row["chips"]), float(row["tokens_per_second"])) for row in rows] for name, rows in curves.items()
    }
    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    first = min(every)
    last = max(x for x, _ in every)
    ideal = [first, (last, first[1] * last / first[0])]
    ys = [y for _, y in [*every, *ideal]]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    ticks = [(10.0**power, _short(10.0**power)) for power in range(low, max(high, low + 1) + 1)]
    chart = _Chart("tokens/s by chips", [x for x, _ in every], ticks, logarithmic=True)
    chart.line(ideal, "var(--quiet)", "ideal", dashed=True)
    for name, line in points.items():
        chart.line(line, _COLOURS[name], name)
    return chart.svg()


def _shares(rows: Sequence[dict[str, Any]], goodput: Sequence[dict[str, Any]]) -> str:
    """Draw goodput by chips: the recipe's own checkpoints without a spare, and the best of both."""
    ticks = [(share / 4, f"{share / 4:.0%}") for share in range(5)]
    chart = _Chart("goodput by chips", [row["chips"] for row in rows], ticks, logarithmic=False)
    alone = [
        (row["chips"], one["goodput_at_checkpoint_every"] * one["spares"][0]["availability"])
        for row, one in zip(rows, goodput, strict=True)
    ]
    chart.line([(row["chips"], row["efficiency"]) for row in rows], _COLOURS["weak"], "weak efficiency", dashed=True)
    chart.line([(row["chips"], row["goodput"]) for row in rows], _COLOURS["goodput"], "best interval, spares")
    chart.line(alone, _COLOURS["alone"], "the recipe, no spare")
    return chart.svg()


class _Chart:
    """Lines over chips on a logarithmic axis."""

    def __init__(self, title: str, xs: Sequence[float], ticks: Sequence[tuple[float, str]], *, logarithmic: bool):
        self.title, self.ticks, self.logarithmic = title, ticks, logarithmic
        self.xs = sorted(set(xs))
        self.low, self.high = (math.log(f(self.xs)) for f in (min, max))
        self.bottom, self.top = (self._scaled(ticks[i][0]) for i in (0, -1))
        self.parts: list[str] = []
        self.labels: list[tuple[float, str, str]] = []

    def _scaled(self, y: float) -> float:
        return math.log10(max(y, 1e-30)) if self.logarithmic else y

    def _x(self, x: float) -> float:
        share = (math.log(x) - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, y: float) -> float:
        share = (self._scaled(y) - self.bottom) / (self.top - self.bottom)
        return _HEIGHT - _BOTTOM - min(1.0, max(0.0, share)) * (_HEIGHT - _TOP - _BOTTOM)

    def line(self, points: Sequence[Point], colour: str, name: str, *, dashed: bool = False) -> None:
        if not points:
            return
        places = [(self._x(x), self._y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ";stroke-dasharray:5 4" if dashed else ""
        self.parts.append(f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:2{dash}"/>')
        for (x, y), (chips, value) in zip(places, points, strict=True):
            tip = f"{name}: {value:.1%}" if not self.logarithmic else f"{name}: {value:,.0f} tokens/s"
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 if dashed else 3.5}" style="fill:{colour}">'
            self.parts.append(f"{dot}<title>{chips:,.0f} chips, {escape(tip)}</title></circle>")
        self.labels.append((places[-1][1], colour, name))

    def svg(self) -> str:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = []
        for value, text in self.ticks:
            y = self._y(value)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" style="stroke:var(--line)"/>')
            parts.append(_label(_LEFT - 8, y + 4, text, "end"))
        shown = math.inf
        for x in reversed(self.xs):
            if shown - self._x(x) > 44:
                shown = self._x(x)
                parts.append(f'<path d="M{shown:.1f} {bottom}v5" style="stroke:var(--quiet)"/>')
                parts.append(_label(shown, bottom + 19, f"{x:,.0f}", "middle"))
        parts.append(_label((_LEFT + right) / 2, _HEIGHT - 6, self.title, "middle"))
        at = -math.inf
        for y, colour, name in sorted(self.labels):
            at = max(y + 4, at + 15)  # none on another
            parts.append(_label(right + 10, at, name, "start", colour))
        box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
        style = 'style="max-width:100%;height:auto;font:12px system-ui,sans-serif"'
        name = f'role="img" aria-label={quoteattr(self.title)}'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {name} {style}>{"".join([*parts, *self.parts])}</svg>'


def _label(x: float, y: float, text: str, anchor: str, colour: str = "var(--quiet)") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{colour}">{escape(text)}</text>'


# Words --------------------------------------------------------------------------------------------------------------


def _data(key: str, value: float, text: Callable[[Any], str]) -> str:
    return f"<data data-key={quoteattr(key)} value={quoteattr(str(value))}>{escape(text(value))}</data>"


def _short(value: float) -> str:
    for suffix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:,.0f}{suffix}"
    return f"{value:g}"
