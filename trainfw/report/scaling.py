"""Scaling curves, and what failures leave of them: a section for the page of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trainfw.report.charts import Line, chart, powers_of_ten
from trainfw.report.page import template

_COLOURS = {"weak": "#3f66b0", "strong": "#d9772b", "goodput": "#2a9d68", "alone": "#b7841a"}


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
    lines: list[Line] = [("ideal", "var(--quiet)", "dashed", ideal)]
    lines += [(name, _COLOURS[name], "solid", points) for name, points in curves.items() if points]
    ticks = powers_of_ten([y for _, y in [*every, *ideal]])
    return _by_chips(f"{counted}/s by chips", ticks, lines, lambda rate: f"{rate:,.0f} {counted}/s", powers=True)


def _shares(goodput: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Draw goodput by chips: the recipe's own checkpoints without a spare, and the best of both."""
    alone = [one["goodput_at_checkpoint_every"] * one["spares"][0]["availability"] for _, one in goodput]
    chips = [row["chips"] for row, _ in goodput]
    lines: list[Line] = [
        ("weak efficiency", _COLOURS["weak"], "dashed", list(zip(chips, [row["efficiency"] for row, _ in goodput]))),
        (
            "best interval, spares",
            _COLOURS["goodput"],
            "solid",
            list(zip(chips, [row["goodput"] for row, _ in goodput])),
        ),
        ("the recipe, no spare", _COLOURS["alone"], "solid", list(zip(chips, alone))),
    ]
    ticks = [(share / 4, f"{share / 4:.0%}") for share in range(5)]
    return _by_chips("goodput by chips", ticks, lines, lambda share: f"{share:.1%}")


def _by_chips(
    title: str,
    ticks: Sequence[tuple[float, str]],
    lines: Sequence[Line],
    text: Callable[[float], str],
    *,
    powers: bool = False,
) -> dict[str, Any]:
    def tip(name: str, chips: float, value: float) -> str:
        return f"{chips:,.0f} chips, {name}: {text(value)}"

    return chart(title, ticks, lines, powers=powers, tip=tip, column=lambda chips: f"{chips:,.0f}")
