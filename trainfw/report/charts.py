"""Lines and points over an axis: what `draw` of `macros.html` draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 64, 132, 16, 44
Line = tuple[str, str, str, Sequence[tuple[float, float]]]
"""Name, colour, `solid`, `dashed` or `points`, and points."""


def chart(
    title: str,
    ticks: Sequence[tuple[float, str]],
    lines: Sequence[Line],
    *,
    powers: bool,
    tip: Callable[[str, float, float], str],
    column: Callable[[float], str],
    logarithmic: bool = True,
    room: int = _RIGHT,
) -> dict[str, Any]:
    """Place lines over an axis.

    Args:
        ticks: (value; text).
        powers: values, too, are on a logarithmic axis, and ticks are powers of 10.
        tip: name, place and value -> text of a point.
        column: text of a place on the axis.
        logarithmic: the axis is.
        room: pixels for names beside the lines.
    """
    xs = sorted({x for *_, points in lines for x, _ in points})
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    along = math.log if logarithmic else float

    def across(x: float) -> float:
        share = (along(x) - along(xs[0])) / (along(xs[-1]) - along(xs[0])) if len(xs) > 1 else 0.5
        return _LEFT + share * (right - _LEFT)

    def up(y: float) -> float:
        share = (y - ticks[0][0]) / (ticks[-1][0] - ticks[0][0])
        return bottom - min(1.0, max(0.0, share)) * (bottom - _TOP)

    def placed(name: str, x: float, y: float) -> tuple[float, float, str]:
        return across(x), up(math.log10(max(y, 1e-30)) if powers else y), tip(name, x, y)

    drawn: list[dict[str, Any]] = [
        {"name": name, "colour": colour, "kind": kind, "points": [placed(name, x, y) for x, y in points]}
        for name, colour, kind, points in lines
    ]
    columns: list[tuple[float, str]] = []
    for x in reversed(xs):
        if not columns or columns[-1][0] - across(x) > 44:
            columns.append((across(x), column(x)))
    names: list[tuple[float, dict[str, Any]]] = []
    for line in sorted(drawn, key=lambda line: line["points"][-1][1]):
        lowest = names[-1][0] + 15 if names else -math.inf  # none on another
        names.append((max(line["points"][-1][1] + 4, lowest), line))
    rows = [(up(value), text) for value, text in ticks]
    sides = {"width": right + room, "height": _HEIGHT, "left": _LEFT, "right": right, "bottom": bottom}
    return {"title": title, "lines": drawn, "rows": rows, "columns": columns, "names": names, **sides}


def powers_of_ten(values: Sequence[float]) -> list[tuple[float, str]]:
    """Give the ticks of a logarithmic axis that these values lie on."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [(power, _short(10.0**power)) for power in range(low, max(high, low + 1) + 1)]


def _short(value: float) -> str:
    suffix, scale = next((pair for pair in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= pair[1]), ("", 1))
    return f"{value / scale:,.0f}{suffix}" if suffix else f"{value:g}"
