"""A topology drawn with boxes and lines for a terminal."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

from rich.text import Text

from trainfw.hardware import Dimension, Topology
from trainfw.parallel import Placement
from trainfw.report.text import (
    COLOURS,
    WIDTH,
    axes_between,
    axes_of_dim,
    chunks,
    kind_in_words,
    mesh_positions,
    rate_in_words,
    spans,
)

_MOST_BOXES = 24
Line = tuple[str, str]
"""Text and its style."""


def draw_topology(topology: Topology, placement: Placement | None = None, *, width: int = WIDTH) -> Iterator[Text]:
    """Draw level by level from the outermost: units on their network, nodes or racks of a unit, chips of a node.

    Every level shows the inside of the first place of the one above. With a placement, a box also says which places
    of the mesh axes its cores hold, and links have the colour of the axis that runs along them.
    """
    positions = {} if placement is None else mesh_positions(placement)
    dims = list(topology.chip_dims)
    grid = len(dims) >= 2 and {dims[-1].kind, dims[-2].kind} <= {"ring", "line"}
    levels: list[list[Dimension]] = [[dim] for dim in dims[: -2 if grid else len(dims)]]
    levels += [dims[-2:]] if grid else []
    inside: list[str] = []

    def contents(level: int, place: int) -> list[Line]:
        chips = math.prod(dim.size for dims in levels[level + 1 :] for dim in dims)
        cores = range(place * chips * topology.cores_per_chip, (place + 1) * chips * topology.cores_per_chip)
        held = levels[level] if levels else []
        name = held[0].name if len(held) == 1 else "chip"
        return [
            (f"{'unit' if name == 'network' else name} {place}", "bold"),
            (f"core{'s' * (len(cores) > 1)} {spans(cores)}", ""),
            *((f"{axis} {spans(at[list(cores)])}", COLOURS[axis]) for axis, at in reversed(positions.items())),
        ]

    def style(dim: Dimension, stride: int, a: int, b: int) -> str:
        if placement is None:
            return ""
        axes = axes_between(placement, positions, a * stride, b * stride)
        axes = axes if dim.kind in ("ring", "line") else axes_of_dim(placement, dim.name)
        return COLOURS[axes[0]] if axes else ""

    if not levels:
        canvas, box = _Canvas(width), contents(0, 0)
        canvas.box(0, 4, max(len(text) for text, _ in box), box)
        yield from canvas.lines()
    for level, held in enumerate(levels):
        stride = math.prod(dim.size for dims in levels[level + 1 :] for dim in dims)
        title = " x ".join(f"{dim.name} ({kind_in_words(dim)}, {rate_in_words(dim)})" for dim in held)
        yield Text(f"{title}{', inside ' + ', '.join(inside) if inside else ''}", style="bold")
        inside.append(f"{'unit' if held[0].kind == 'network' else held[0].name} 0")
        size = math.prod(dim.size for dim in held)
        boxes = [contents(level, place) for place in range(min(size, _MOST_BOXES))]
        styles = [functools.partial(style, dim, stride) for dim in held]
        canvas = _Canvas(width)
        if len(held) == 2:
            canvas.grid(chunks(boxes, held[1].size), held, *styles)
        else:
            canvas.row(boxes, held[0], *styles)
        yield from canvas.lines()
        if size > len(boxes):
            yield Text(f"  ... and {size - len(boxes)} more")
        yield Text()
    if any(dim.wraps for dim in dims):
        yield Text("╌ ╎  the link goes on: to the next line of boxes, or around to the other end", style="dim")


class _Canvas:
    """Characters with styles at (row, column), in `columns` columns where boxes allow it."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.cells: dict[tuple[int, int], tuple[str, str]] = {}

    def put(self, y: int, x: int, text: str, style: str = "") -> None:
        for i, char in enumerate(text):
            self.cells[y, x + i] = (char, style)

    def lines(self) -> Iterator[Text]:
        for y in range(max(y for y, _ in self.cells) + 1):
            line = Text()
            for x in range(max((x for row, x in self.cells if row == y), default=-1) + 1):
                line.append(*self.cells.get((y, x), (" ", "")))
            yield line

    def box(self, y: int, x: int, width: int, contents: Sequence[Line]) -> None:
        """Draw a box whose text is `width` wide; it takes width + 4 columns and len(contents) + 2 rows."""
        self.put(y, x, "┌" + "─" * (width + 2) + "┐")
        for i, (text, style) in enumerate(contents, start=1):
            self.put(y + i, x, "│ " + " " * width + " │")
            self.put(y + i, x + 2, text, style)
        self.put(y + len(contents) + 1, x, "└" + "─" * (width + 2) + "┘")

    def row(self, boxes: Sequence[Sequence[Line]], dim: Dimension, style: Callable[[int, int], str]) -> None:
        """Draw boxes of one dim side by side, over as many lines as they need."""
        width = max(len(text) for contents in boxes for text, _ in contents)
        tall = len(boxes[0]) + 2
        switch = dim.kind in ("switch", "network")
        pitch = width + 4 + (1 if switch else 3)
        y = 0
        lines = math.ceil(len(boxes) / max(1, (self.columns - 8) // pitch))
        for line in chunks(range(len(boxes)), math.ceil(len(boxes) / lines)):
            if switch:
                self.put(y, 3, "═" * (len(line) * pitch + 1), style(0, 1))
                y += 1
            for column, i in enumerate(line):
                x = 4 + column * pitch
                self.box(y, x, width, boxes[i])
                if switch:
                    self.put(y - 1, x + width // 2 + 2, "╤", style(0, 1))
                    self.put(y, x + width // 2 + 2, "┴")
                else:
                    goes_on = i + 1 < dim.size or dim.wraps
                    after = style(i, (i + 1) % dim.size) if goes_on else ""
                    before = style(i - 1 if i else dim.size - 1, i) if i or dim.wraps else ""
                    if goes_on:
                        self.put(y + 1, x + width + 3, "├" + ("───" if column + 1 < len(line) else "╌╌"), after)
                    if column:
                        self.put(y + 1, x, "┤", before)
                    elif i or dim.wraps:
                        self.put(y + 1, x - 2, "╌╌┤", before)
            y += tall

    def grid(
        self,
        boxes: Sequence[Sequence[Sequence[Line]]],
        dims: Sequence[Dimension],
        down: Callable[[int, int], str],
        across: Callable[[int, int], str],
    ) -> None:
        """Draw boxes of two dims of rings or lines; links that wrap leave at the edges."""
        width = max(len(text) for row in boxes for contents in row for text, _ in contents)
        tall = len(boxes[0][0]) + 2
        (rows, wraps_down), (columns, wraps_across) = ((dim.size, dim.wraps) for dim in dims)
        pitch = width + 4 + 3
        for r, row in enumerate(boxes):
            for c, contents in enumerate(row):
                y, x, here = 1 + r * (tall + 1), 4 + c * pitch, r * columns + c
                self.box(y, x, width, contents)
                middle = x + width // 2 + 2
                right, below = r * columns + (c + 1) % columns, (r + 1) % rows * columns + c
                left, above = r * columns + (c - 1) % columns, (r - 1) % rows * columns + c
                if c + 1 < columns or wraps_across:
                    self.put(y + 1, x + width + 3, "├" + ("───" if c + 1 < columns else "╌╌"), across(here, right))
                if c or wraps_across:
                    self.put(y + 1, x, "┤", across(left, here))
                    if not c:
                        self.put(y + 1, x - 2, "╌╌", across(left, here))
                if r + 1 < rows or wraps_down:
                    self.put(y + tall - 1, middle, "┬", down(here, below))
                    self.put(y + tall, middle, "│" if r + 1 < rows else "╎", down(here, below))
                if r or wraps_down:
                    self.put(y, middle, "┴", down(above, here))
                    if not r:
                        self.put(y - 1, middle, "╎", down(above, here))
