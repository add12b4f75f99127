"""A topology and a placement in words and lines of text: what lies where, and the colours of the axes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.text import Text

from trainfw.hardware import Dimension, Topology, load_topology, topology_names
from trainfw.parallel import AXES, Placement, runs

# Of one lightness, so that they read on light and dark alike.
COLOURS = {
    "pipeline": "#d6478f",
    "data": "#9061d8",
    "fsdp": "#3b82e0",
    "expert": "#b7841a",
    "context": "#2a9d68",
    "tensor": "#e0552f",
}


def mesh_positions(placement: Placement) -> dict[str, np.ndarray]:
    """Map each axis larger than 1 to the place of every physical core along it, an int array (cores,)."""
    places = np.indices(placement.order.shape).reshape(placement.order.ndim, -1)
    by_core = np.empty_like(places)
    by_core[:, placement.order.ravel()] = places
    return {axis: by_core[i] for i, axis in enumerate(AXES) if placement.layout.sizes[axis] > 1}


def axes_between(placement: Placement, positions: dict[str, np.ndarray], a: int, b: int) -> list[str]:
    """List the axes along which one moves from chip `a` to chip `b`, the one with the most communication first."""
    per_chip = placement.topology.cores_per_chip
    mine, theirs = slice(a * per_chip, (a + 1) * per_chip), slice(b * per_chip, (b + 1) * per_chip)
    return [axis for axis in reversed(positions) if (positions[axis][mine] != positions[axis][theirs]).any()]


def axes_of_dim(placement: Placement, dim: str) -> list[str]:
    """List the axes that lie on a dim or on parts of it, the one with the most communication first."""
    found = [axis.axis for axis in placement.axes if dim in {part.split(".")[0] for part in axis.parts}]
    return sorted(found, key=AXES.index, reverse=True)


def spans(numbers: Iterable[int], most: int = 11) -> str:
    """Write `0-3`, `0-3,12-15`, or how many there are when that is longer than `most` characters."""
    distinct = set(map(int, numbers))
    text = ",".join(runs(distinct))
    return text if len(text) <= most else f"{len(distinct)} of them"


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)] or [items]


def kind_in_words(dim: Dimension) -> str:
    """Write `ring of 4`."""
    if dim.kind == "chip":
        return "cores of a chip"
    return "pair" if dim.kind == "ring" and dim.size == 2 else f"{dim.kind} of {dim.size}"


def part_in_words(part: str) -> str:
    """Name a part of an evenly divided dim: `4 of gpu`, `2 of gpu, 4 apart`; other parts have their own names."""
    dim, _, piece = part.partition(".")
    size, _, stride = piece.partition("@")
    if not size.isdigit():
        return part
    return f"{size} of {dim}, {stride} apart" if stride else f"{size} of {dim}"


WIDTH = 100
"""Columns, where it is not said how many there are."""


def amount(value: float, unit: str) -> str:
    """Write `185.6 TB/s`, `6 TiB`, `667 TFLOP/s`: with the prefix that fits, at most 2 decimals.

    Sizes (`B`) in multiples of 1,024, unless they are whole GB; rates in multiples of 1,000.
    """
    binary = unit == "B" and value % 1e9 != 0
    base = 1024.0 if binary else 1000.0
    for prefix in ("", "Ki" if binary else "k", *(f"{p}i" if binary else p for p in "MGTP")):
        if value < base or prefix.startswith("P") or (prefix == "T" and unit == "B/s"):
            break
        value /= base
    return f"{value:,.2f}".rstrip("0").rstrip(".") + f" {prefix}{unit}"


def rate_in_words(dim: Dimension) -> str:
    """Write `46.4 GB/s a link`."""
    per = {"chip": "core", "ring": "link", "line": "link"}.get(dim.kind, "chip")
    return f"{amount(dim.bandwidth, 'B/s')} a {per}"


def list_topologies() -> Iterator[Text]:
    """Write a line for each topology."""
    names = topology_names()
    width = max(map(len, names))
    for name in names:
        topology = load_topology(name)
        parts = [f"{topology.chips:>4} chip{'s' if topology.chips > 1 else ' '}", f"{topology.cores:>4} cores"]
        peak = topology.peak_flops("bfloat16")
        parts.append("" if topology.hbm_size is None else amount(topology.hbm_size * topology.cores, "B"))
        parts.append("" if peak is None else amount(peak * topology.cores, "FLOP/s") + " bf16")
        figures = f"  {parts[0]} {parts[1]} {parts[2]:>10} {parts[3]:>19}"
        yield Text.assemble((f"{name:{width}}", "bold"), figures)
        yield Text(f"{'':{width}}  {topology.description}", style="dim")


def describe_topology(topology: Topology, *, width: int = WIDTH) -> Iterator[Text]:
    """Describe the parts of a topology, with rates and links."""
    yield Text.assemble((topology.in_words, "bold"), f": {topology.description}")
    lnc = f" (LNC {topology.lnc}: {topology.lnc} of {topology.chip.cores} physical cores each)"
    instances = f", {topology.instances} instances" if topology.instances > 1 else ""
    yield Text(
        f"  {topology.chips} chip{'s' * (topology.chips > 1)} x {topology.cores_per_chip} "
        f"core{'s' * (topology.cores_per_chip > 1)} = {topology.cores} cores{instances}"
        f"{lnc if len(topology.chip.device_kinds) > 1 else ''}"
    )
    yield _row("chip", topology.chip.description)
    kinds = ", ".join(topology.device_kinds) or "no document names it"
    yield _row("device kind", f"{kinds} (in JAX)")
    peaks = [key.rpartition(".")[2] for key in topology.figures if key.startswith("chip.peak_flops.")]
    if not peaks:
        yield _row("peak", "not known")
    figures = [(f"peak {dtype}", topology.peak_flops(dtype), "FLOP/s") for dtype in peaks]
    figures += [("HBM", topology.hbm_size, "B"), ("HBM bandwidth", topology.hbm_bandwidth, "B/s")]
    for label, value, unit in figures:
        if value is not None:
            yield _row(label, f"{amount(value, unit)} a core, {amount(value * topology.cores, unit)} in all")
    if "host_memory" in topology.figures:
        yield _row("host memory", f"{topology.figures['host_memory'].value}{' each' if topology.count > 1 else ''}")
    if topology.price is not None:
        yield _row(
            "price", f"${topology.dollars_per_hour:,.2f} an hour ({topology.price.terms}, {topology.price.date})"
        )
    yield Text()
    yield Text("dims, outermost first (bandwidth in one direction, latency of a hop)", style="bold")
    for dim in topology.dims:
        text = f"  {dim.name:8} {kind_in_words(dim):15} {rate_in_words(dim):19} {dim.latency * 1e6:5g} us  "
        for line in textwrap.wrap(dim.description, max(width - len(text), 20), break_on_hyphens=False):
            yield Text(text + line)
            text = " " * len(text)
    if not topology.dims:
        yield Text("  none: one core")


def doubtful_figures(topology: Topology, *, width: int = WIDTH) -> Iterator[Text]:
    """List figures on which documents disagree, or that are derived or assumed; each once, with every value."""
    found: dict[tuple, list[str]] = {}
    used = ("chip.", "host_memory", *(f"{dim.link}." for dim in topology.dims))
    for key, figure in topology.figures.items():
        if figure.doubtful and key.startswith(used):
            found.setdefault((figure.value, figure.source, figure.note, *figure.also), []).append(key)
    if found:
        yield Text("figures on which documents disagree, or that are derived or assumed", style="bold")
    for keys in found.values():
        figure = topology.figures[keys[0]]
        yield Text(f"  {', '.join(keys)} = {figure.value}")
        yield from _wrapped(figure.source, width)
        for claim in figure.also:
            yield from _wrapped(f"but {claim.value}: {claim.source}", width)
        if figure.note:
            yield from _wrapped(figure.note, width)
    if found:
        yield Text("  (replace one with hardware.parameters in a recipe)")


def describe_placement(placement: Placement) -> Iterator[Text]:
    """Write the table of axes."""
    yield Text.assemble(("layout ", "bold"), str(placement.layout))
    lies = [" + ".join(axis.parts) for axis in placement.axes]
    width = max([len("lies on"), *map(len, lies)])
    head = f"  {'axis':8} {'size':>5}  {'lies on':{width}}  ring  permutes  hops  {'a core':>11}  groups"
    yield Text(head, style="dim")
    for axis, on in zip(placement.axes, lies, strict=True):
        legal = axis.problem or ("legal" if axis.documented else "legal*")
        ring, permutes = ("yes" if holds else "no" for holds in (axis.ring, axis.permutes))
        yield Text.assemble(
            (f"  {axis.axis:8}", COLOURS[axis.axis]),
            f" {axis.size:5}  {on:{width}}  {ring:4}  {permutes:8}  {axis.hops:4}  "
            f"{amount(axis.bandwidth, 'B/s'):>11}  {legal}",
        )
    for part in dict.fromkeys(part for axis in placement.axes for part in axis.parts):
        if "@" in part:
            yield Text(f"  {part}: {part_in_words(part)}", style="dim")
    if not all(axis.documented for axis in placement.axes):
        yield Text("  * no document lists which groups may be formed here; none speaks against these", style="dim")


def _row(label: str, text: str) -> Text:
    return Text.assemble((f"  {label:18} ", "dim"), text)


def _wrapped(text: str, width: int) -> Iterator[Text]:
    for line in textwrap.wrap(text, width - 6, break_long_words=False, break_on_hyphens=False):
        yield Text(f"      {line}", style="dim")
