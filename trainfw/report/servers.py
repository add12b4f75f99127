"""The page of a server's plan, and of a search for its layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainfw.hardware import duration
from trainfw.report.charts import Line, chart, powers_of_ten
from trainfw.report.page import template

_MEMORY_COLOURS = {"weights": "#24508f", "caches": "#d9772b", "temporaries": "#8a94a0", "runtime": "#5b6672"}
_TIME_COLOURS = {
    "weights": "#24508f",
    "cache": "#d9772b",
    "compute": "#3f66b0",
    "activations": "#7d8794",
    "collectives": "#2a9d68",
    "layers": "#b7841a",
}
_TIMES = {"time_per_token": "time per token", "time_to_first_token": "time to first token"}


def servers_page(title: str, lines: Sequence[str], found: Mapping[str, Any], dollars_per_hour: float | None) -> str:
    """Fill `servers.html`, which is well-formed as XML too.

    Args:
        title: the model and its hardware.
        lines: what a reader is to know first, in words.
        found: `trainfw.planning.ServerPlan.to_json()`, or that of `FoundServers`.
        dollars_per_hour: price of the hardware.

    A figure stands in a `<data>` element with its value in full, and its key in `found` in `data-key`.
    """
    searched = "servers" in found
    key = "servers" if searched else "slots"
    rows = [(f"{key}.{i}.", row) for i, row in enumerate(found[key]) if not searched or row["pareto"]]
    fitting = [row for row in found[key] if searched and row["fits_with_room"]]
    filled = template("servers.html").render(
        title=title,
        lines=lines,
        found=found,
        searched=searched,
        rows=rows,
        capacity=found["memory_capacity_bytes_per_core"],
        charts=[_front(name, fitting, dollars_per_hour) for name in _TIMES] if fitting else [],
        memory_colours=_MEMORY_COLOURS,
        time_colours=_TIME_COLOURS,
        option=_option,
    )
    return str(filled)


def _option(row: Mapping[str, Any]) -> str:
    """Write the layout of a server as `--layout` takes it."""
    return ",".join(f"{axis}={size}" for axis, size in row["layout"].items() if size > 1) or "data=1"


def _front(name: str, servers: Sequence[Mapping[str, Any]], dollars_per_hour: float | None) -> dict[str, Any]:
    """Draw servers by one of `_TIMES` and by price, or by hours of the hardware where it has none."""
    unit = "hours of the hardware" if dollars_per_hour is None else "dollars"

    def point(server: Mapping[str, Any]) -> tuple[float, float]:
        return server[f"{name}_seconds"], (dollars_per_hour or 1.0) * 1e6 / server["tokens_per_second"] / 3600

    places = {point(server): f"{server['slots']:,} slots, {_option(server)}" for server in servers}
    front = sorted(point(server) for server in servers if name in server["pareto"])
    others = [point(server) for server in servers if name not in server["pareto"]]
    lines: list[Line] = [("others", "var(--quiet)", "points", others)] if others else []
    lines.append(("Pareto set", "#b4431f", "solid", front))

    def tip(_: str, seconds: float, price: float) -> str:
        return f"{places[seconds, price]}: {duration(seconds)}, {price:,.3g} {unit} for a million tokens"

    title, ticks = f"{unit} for 1M tokens by {_TIMES[name]}", powers_of_ten([price for _, price in places])
    return chart(title, ticks, lines, powers=True, tip=tip, column=duration)
