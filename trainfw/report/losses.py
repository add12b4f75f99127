"""Losses over what was chosen for the runs: a drawing that is a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from trainfw.report.charts import Line, chart
from trainfw.report.page import template

_COLOURS = ("#3f66b0", "#d9772b", "#2a9d68", "#b7841a", "#9a4fb0", "#5b6672", "#c2405d", "#3a9db0")
_LETTER = 6.6
"""Pixels of a letter, at most."""
Points = Sequence[tuple[float, float]]


def loss_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    column: Callable[[float], str],
    logarithmic: bool = True,
    fits: Mapping[str, Points] | None = None,
    points: bool = False,
) -> dict[str, object]:
    """Place losses over an axis.

    Args:
        lines: points by name.
        column: text of a place on the axis.
        logarithmic: the axis is.
        fits: curves by the name of the line that they were fitted to, or by a name of their own.
        points: lines are points alone.
    """
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(lines)}
    fits = fits or {}
    drawn: list[Line] = [
        (name if name not in colours else "", colours.get(name, "var(--quiet)"), "dashed", placed)
        for name, placed in fits.items()
    ]
    drawn += [(name, colours[name], "points" if points else "solid", placed) for name, placed in lines.items()]
    every = [y for *_, placed in drawn for _, y in placed]
    return chart(
        title,
        loss_ticks(min(every), max(every)),
        drawn,
        powers=False,
        tip=lambda name, x, y: f"{f'{name}: ' * bool(name)}{column(x)}, loss {y:.4f}",
        column=column,
        logarithmic=logarithmic,
        room=int(20 + _LETTER * max(len(name) for name, *_ in drawn)),
    )


def loss_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Choose four to nine round ticks that enclose two losses."""
    span = max(high - low, 1e-3 * max(abs(high), 1e-3))
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0) if span / (power * part) <= 7)
    first, last = math.floor(low / step), math.ceil(high / step)
    digits = max(0, -math.floor(math.log10(step)))
    return [(number * step, f"{number * step:.{digits}f}") for number in range(first, max(last, first + 1) + 1)]


def svg_of_chart(placed: dict[str, object]) -> str:
    """Write a chart as the text of an SVG file, in the style of the pages."""
    return str(template("chart.svg").render(chart=placed))
