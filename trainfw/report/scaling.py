"""Scaling curves, and what failures leave of them: a section for the page of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trainfw.report.page import template

_COLOURS = {"weak": "#3f66b0", "strong": "#d9772b", "goodput": "#2a9d68", "alone": "#b7841a"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 64, 132, 16, 44


def scaling_section(scaling: Any) -> str:
    """Fill `scaling.html` for a `trainfw.planning.Scaling`: well-formed as XML, in the page's own style.

    A figure of `scaling.to_json()` stands in a `<data>` element with its value in full, and its key in `data-key`.
    """
    found, (counted, _) = scaling.to_json(), scaling.counted
    planned = {name: [row for row in found["scaling"][name] if row["problem"] is None] for name in ("weak", "strong")}
    goodput = list(zip(planned["weak"], found["goodput"]["weak"], strict=True))
    filled = template("scaling.html").render(
        found=found,
        batch=scaling.recipe.train.global_batch_size,
        batch_of="images" if counted == "images" else "sequences",
        counted=counted,
        run=scaling.counted_in_words,
        colours=_COLOURS,
        charts=[_throughput(planned, counted)] * any(planned.values()) + [_shares(goodput)] * bool(goodput),
        goodput=goodput,
        INFINITE=math.inf,
    )
    return str(filled)


def _throughput(planned: dict[str, list[dict[str, Any]]], counted: str) -> dict[str, Any]:
    """Draw tokens/s (or images/s) by chips, both logarithmic, with the line that the fewest chips promise."""
    curves = {name: [(row["chips"], row[f"{counted}_per_second"]) for row in rows] for name, rows in planned.items()}
    every = [point for points in curves.values() for point in points]
    first, last = min(every), max(x for x, _ in every)
    ideal = [first, (last, first[1] * last / first[0])]
    ys = [y for _, y in [*every, *ideal]]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    powers = range(low, max(high, low + 1) + 1)
    lines = [("ideal", "var(--quiet)", True, ideal)]
    lines += [(name, _COLOURS[name], False, points) for name, points in curves.items() if points]
    ticks = [(power, _short(10.0**power)) for power in powers]
    return _chart(f"{counted}/s by chips", ticks, lines, rate=f"{counted}/s")


def _shares(goodput: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Draw goodput by chips: the recipe's own checkpoints without a spare, and the best of both."""
    alone = [one["goodput_at_checkpoint_every"] * one["spares"][0]["availability"] for _, one in goodput]
    chips = [row["chips"] for row, _ in goodput]
    lines = [
        ("weak efficiency", _COLOURS["weak"], True, list(zip(chips, [row["efficiency"] for row, _ in goodput]))),
        ("best interval, spares", _COLOURS["goodput"], False, list(zip(chips, [row["goodput"] for row, _ in goodput]))),
        ("the recipe, no spare", _COLOURS["alone"], False, list(zip(chips, alone))),
    ]
    return _chart("goodput by chips", [(share / 4, f"{share / 4:.0%}") for share in range(5)], lines)


def _chart(
    title: str,
    ticks: Sequence[tuple[float, str]],
    lines: Sequence[tuple[str, str, bool, Sequence[tuple[float, float]]]],
    *,
    rate: str = "",
) -> dict[str, Any]:
    """Place lines (name, colour, dashed, points) over chips on a logarithmic axis; values, too, of a `rate`.

    Ticks are (value, or its power of 10; text).
    """
    chips = sorted({x for *_, points in lines for x, _ in points})
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        share = math.log(x / chips[0]) / math.log(chips[-1] / chips[0]) if len(chips) > 1 else 0.5
        return _LEFT + share * (right - _LEFT)

    def up(y: float) -> float:
        share = (y - ticks[0][0]) / (ticks[-1][0] - ticks[0][0])
        return bottom - min(1.0, max(0.0, share)) * (bottom - _TOP)

    def placed(name: str, x: float, y: float) -> tuple[float, float, str]:
        value = f"{y:,.0f} {rate}" if rate else f"{y:.1%}"
        return across(x), up(math.log10(max(y, 1e-30)) if rate else y), f"{x:,.0f} chips, {name}: {value}"

    drawn: list[dict[str, Any]] = [
        {"name": name, "colour": colour, "dashed": dashed, "points": [placed(name, x, y) for x, y in points]}
        for name, colour, dashed, points in lines
    ]
    columns: list[tuple[float, str]] = []
    for x in reversed(chips):
        if not columns or columns[-1][0] - across(x) > 44:
            columns.append((across(x), f"{x:,.0f}"))
    names: list[tuple[float, dict[str, Any]]] = []
    for line in sorted(drawn, key=lambda line: line["points"][-1][1]):
        lowest = names[-1][0] + 15 if names else -math.inf  # none on another
        names.append((max(line["points"][-1][1] + 4, lowest), line))
    rows = [(up(value), text) for value, text in ticks]
    sides = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": right, "bottom": bottom}
    return {"title": title, "lines": drawn, "rows": rows, "columns": columns, "names": names, **sides}


def _short(value: float) -> str:
    suffix, scale = next((pair for pair in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= pair[1]), ("", 1))
    return f"{value / scale:,.0f}{suffix}" if suffix else f"{value:g}"
