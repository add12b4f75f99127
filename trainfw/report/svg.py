"""A topology, and where the axes of a layout lie on it, as an SVG picture 1,200 wide."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape, quoteattr

from trainfw.hardware import Dimension, Topology
from trainfw.parallel import Placement
from trainfw.report.text import (
    COLOURS,
    amount,
    axes_between,
    axes_of_dim,
    kind_in_words,
    mesh_positions,
    part_in_words,
    rate_in_words,
    spans,
)

_WIDTH, _MARGIN, _GREY = 1200, 40, "#8a94a0"
_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.background { fill: #ffffff } .quiet { fill: #59636e }
.chip { fill: #f3f5f8; stroke: #98a2ad } .frame { fill: none; stroke: #d3dae1 } .bar { fill: #e6eaef; stroke: #98a2ad }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .background { fill: #0d1117 } .quiet { fill: #9aa5b1 }
  .chip { fill: #1b222b; stroke: #5b6672 } .frame { stroke: #39424d } .bar { fill: #262e38; stroke: #5b6672 }
}
"""
_MOST_UNITS = 16


def topology_svg(topology: Topology, placement: Placement | None = None) -> str:
    """Draw one unit (and, when there are several, their network), as the text of an SVG file.

    Chips stand in their grid, or in a row under their switches; a link has the colour of the mesh axis that runs along
    it (dashed with a second one), and the squares in a chip, its cores, that of the axis inside the chip, darker from
    the first place of the axis to the last. Without a placement colours tell the dims apart.
    """
    return _Picture(topology, placement).draw()


class _Picture:
    def __init__(self, topology: Topology, placement: Placement | None) -> None:
        self.topology, self.placement = topology, placement
        self.positions = {} if placement is None else mesh_positions(placement)
        self.dims = [dim for dim in topology.chip_dims if dim.kind != "network"]
        self.chips = math.prod(dim.size for dim in self.dims)
        self.hues = dict(zip([dim.name for dim in reversed(topology.dims)], reversed(COLOURS.values())))
        self.parts: list[str] = []

    def draw(self) -> str:
        self.text(_MARGIN, 38, self.topology.in_words, size=20, weight="bold")
        each = self.topology.cores_per_chip
        about = f"{self.topology.description}; {each} core{'s' * (each > 1)} a chip"
        self.text(_MARGIN, 60, about if self.placement is None else f"{about}; {self.placement.layout}", quiet=True)
        rings = all(dim.kind in ("ring", "line") for dim in self.dims)
        y = self.torus(96) if rings else self.switched(96)
        y = self.legend((self.network(y + 24) if self.topology.count > 1 else y) + 34)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:.0f}" width="{_WIDTH}" height="{y:.0f}" '
            f'role="img" aria-label={quoteattr(self.topology.name)}>'
        )
        background = f'<rect class="background" width="{_WIDTH}" height="{y:.0f}"/>'
        return "\n".join([head, f"<style>{_STYLE}</style>", background, *self.parts, "</svg>", ""])

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        anchor: str = "start",
        *,
        quiet: bool = False,
        weight: str = "normal",
    ) -> None:
        quieter = ' class="quiet"' if quiet else ""
        style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"{quieter}'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

    def rect(self, kind: str, x: float, y: float, width: float, height: float, round_: float = 4) -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round_}"/>'
        )

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Write a label over lines: what is behind it is covered."""
        width = 6.7 * len(text) + 12
        left = {"start": x - 6, "middle": x - width / 2, "end": x - width + 6}[anchor]
        self.rect("background", left, y - 14, width, 20)
        self.text(x, y, text, anchor=anchor, quiet=True)

    def line(self, path: str, axes: list[str], kind: str = "link", width: float = 2.5, dots: str = "") -> None:
        """Draw a link in the colour of its first axis, dashed with the others'."""
        colours = [COLOURS.get(name) or self.hues.get(name, _GREY) for name in axes[:3]]
        for i, colour in enumerate(colours):
            dash = f' stroke-dasharray="{4 * (3 - i)} {4 + 4 * i}"' if i else ""
            stroke = f'stroke="{colour}" stroke-width="{width}" fill="none"{dash}'
            self.parts.append(f'<path class="{"also" if i else kind}" d="{path}" {stroke}/>')
        for dot in dots.split():
            x, y = dot.split(",")
            self.parts.append(f'<circle cx="{x}" cy="{y}" r="{width}" fill="{colours[0]}"/>')

    def axes(self, dim: Dimension, a: int, b: int | None = None) -> list[str]:
        """List the axes that colour the link from chip `a` to chip `b`, or into a switch."""
        if self.placement is None:
            return [dim.name]
        if b is None:
            return axes_of_dim(self.placement, dim.name) or [""]
        return axes_between(self.placement, self.positions, a, b) or [""]

    def chip(self, chip: int, label: str, x: float, y: float, width: float, height: float) -> None:
        per_chip = self.topology.cores_per_chip
        cores = range(chip * per_chip, (chip + 1) * per_chip)
        places = [f"{axis} {spans(where[list(cores)])}" for axis, where in reversed(self.positions.items())]
        numbers = f"core{'s' * (per_chip > 1)} {spans(cores)}"
        self.parts.append(f"<g><title>{escape(f'chip {chip}: ' + ', '.join([numbers, *places]))}</title>")
        self.rect("chip", x, y, width, height)
        if width >= 100:  # Room for all of it in words.
            self.text(x + 9, y + 18, label, weight="bold")
            self.text(x + width - 9, y + 18, numbers, size=11, anchor="end", quiet=True)
            for i, place in enumerate(places[:3]):
                self.text(x + 9, y + 35 + 14 * i, place, size=11.5)
            top = 26.0 + 14 * min(3, len(places))
        elif width >= 24:
            self.text(x + width / 2, y + 15, label, size=12, anchor="middle", weight="bold")
            top = 20.0
        else:
            self.text(x + width / 2, y + 13, label, size=10, anchor="middle")
            top = 18.0
        self.cores(cores, x + 3, y + top, width - 6, height - top - 4)
        self.parts.append("</g>")

    def cores(self, cores: range, x: float, y: float, width: float, height: float) -> None:
        """Draw squares that fill a rectangle as well as they can."""
        across = max(range(1, len(cores) + 1), key=lambda n: min(width / n, height / math.ceil(len(cores) / n)))
        down = math.ceil(len(cores) / across)
        side = min(width / across, height / down, 26)
        x += (width - side * across) / 2
        y += (height - side * down) / 2
        inside = [] if self.placement is None else axes_of_dim(self.placement, "core")
        if len(cores) == 1:
            inside = list(reversed(self.positions))[:1]
        for i, core in enumerate(cores):
            if inside:
                colour, where = COLOURS[inside[0]], self.positions[inside[0]]
                shade = 0.4 + 0.6 * int(where[core]) / int(where.max())
                edge = f' stroke="{COLOURS[inside[1]]}" stroke-width="{side / 7:.1f}"' if len(inside) > 1 else ""
            else:
                colour, shade, edge = _GREY if self.placement else self.hues.get("core", _GREY), 0.75, ""
            self.parts.append(
                f'<rect x="{x + side * (i % across + 0.08):.1f}" y="{y + side * (i // across + 0.08):.1f}" '
                f'width="{side * 0.84:.1f}" height="{side * 0.84:.1f}" rx="1.5" fill="{colour}" '
                f'fill-opacity="{shade:.2f}"{edge}/>'
            )

    def torus(self, y: float) -> float:
        """Draw grids of chips side by side, equal places joined by a ribbon; return the y of its lower end."""
        inner = self.dims[-2:]
        outer = self.dims[-3] if len(self.dims) > 2 else None
        copies = outer.size if outer else 1
        if len(inner) == 2:
            rows, columns = inner[0].size, inner[1].size
        else:
            rows = 2 if self.chips > 6 else 1
            columns = math.ceil(self.chips / rows)
        between = 44.0
        frame = (_WIDTH - 2 * _MARGIN - (copies - 1) * between) / copies
        stub = 12.0 if copies > 1 else 20.0
        share = 0.78 if copies > 1 else 0.74
        pitch = min(210.0, (frame - 2 * stub - 20) / (columns - 1 + share))
        width = pitch * share
        height = min(width, 96.0) if copies == 1 else width * 0.92
        frame = columns * pitch - (pitch - width) + 2 * stub + 20
        step = height + (pitch - width)
        tall = rows * step - (pitch - width) + 2 * stub + 20
        left = (_WIDTH - copies * frame - (copies - 1) * between) / 2
        per_copy = self.chips // copies
        frames = [left + copy * (frame + between) for copy in range(copies)]
        if outer:
            self.ribbon(outer, frames, y, frame, tall, per_copy)
        for copy, x in enumerate(frames):
            if outer:
                self.text(x + 4, y - 8, f"{outer.name} {copy}", weight="bold")
            self.rect("frame", x, y, frame, tall, round_=8)
            places = {}
            for i in range(per_copy):
                row, column = divmod(i, columns)
                if len(inner) == 1 and row % 2:  # A ring folded into two rows.
                    column = columns - 1 - column
                places[i] = (x + stub + 10 + column * pitch, y + stub + 10 + row * step)
            first = copy * per_copy
            for link in self.topology.links():
                if link.dim in {dim.name for dim in inner} and first <= link.a < first + per_copy:
                    assert isinstance(link.b, int)
                    dim = self.topology.dim(link.dim)
                    ends = [places[link.a - first], places[link.b - first]]
                    self.short_link(ends, width, height, pitch, step, stub, self.axes(dim, link.a, link.b))
            for i, (cx, cy) in places.items():
                self.chip(first + i, str(i), cx, cy, width, height)
        kinds: dict[str, list[str]] = {}
        for dim in inner:
            kinds.setdefault(amount(dim.bandwidth, "B/s"), []).append(dim.name)
        label = "; ".join(f"{' and '.join(names)}: {rate} a link" for rate, names in kinds.items())
        if outer:
            self.text(frames[-1] + frame, 60, label, anchor="end", quiet=True)
        else:
            self.text(left + 4, y - 8, label, quiet=True)
        return y + tall + (3.0 * per_copy + 10 if outer and outer.size > 2 else 0)

    def short_link(
        self,
        ends: list[tuple[float, float]],
        width: float,
        height: float,
        pitch: float,
        step: float,
        stub: float,
        axes: list[str],
    ) -> None:
        """Draw a link between chips that stand side by side, or, around the end of a ring, a stub at both."""
        (ax, ay), (bx, by) = sorted(ends)
        if abs(bx - ax) > 1.5 * pitch:
            middle = ay + height / 2
            out, back = f"M{bx + width:.1f} {middle:.1f}h{stub}", f"M{ax:.1f} {middle:.1f}h{-stub}"
            dots = f"{bx + width + stub:.1f},{middle:.1f} {ax - stub:.1f},{middle:.1f}"
            self.line(out + back, axes, dots=dots)
        elif abs(by - ay) > 1.5 * step:
            low, high, middle = max(ay, by) + height, min(ay, by), ax + width / 2
            path = f"M{middle:.1f} {low:.1f}v{stub}M{middle:.1f} {high:.1f}v{-stub}"
            self.line(path, axes, dots=f"{middle:.1f},{low + stub:.1f} {middle:.1f},{high - stub:.1f}")
        elif abs(bx - ax) > 1:
            self.line(f"M{ax + width:.1f} {ay + height / 2:.1f}H{bx:.1f}", axes)
        else:
            self.line(f"M{ax + width / 2:.1f} {min(ay, by) + height:.1f}V{max(ay, by):.1f}", axes)

    def ribbon(self, dim: Dimension, frames: list[float], y: float, frame: float, tall: float, each: int) -> None:
        """Draw a line for every chip from each grid to the next, and from the last back to the first."""
        for copy, x in enumerate(frames[:-1]):
            for i in range(each):
                at = y + 14 + (tall - 28) * (i + 0.5) / each
                axes = self.axes(dim, copy * each + i, (copy + 1) * each + i)
                self.line(f"M{x + frame:.1f} {at:.1f}H{frames[copy + 1]:.1f}", axes, width=1.6)
        low = y + tall
        if dim.wraps:
            for i in range(each):
                axes = self.axes(dim, (dim.size - 1) * each + i, i)
                start, end, depth = frames[-1] + frame - 14 - 3 * i, frames[0] + 14 + 3 * i, 8 + 3 * (each - i)
                self.line(f"M{start:.1f} {low:.1f}v{depth}H{end:.1f}V{low:.1f}", axes, width=1.6)
            low += 8 + 1.5 * each
        label = f"{dim.name}: {each} links of {amount(dim.bandwidth, 'B/s')} from each to the next, chip to equal chip"
        self.note(_WIDTH / 2, low + 12, label, anchor="middle")

    def switched(self, y: float) -> float:
        """Draw chips in a row between the switches that they have ports into; a second rack mirrored below."""
        direct = [dim for dim in self.dims if dim.kind != "switch"]
        switches = [dim for dim in self.dims if dim.kind == "switch"]
        racks = math.prod(dim.size for dim in direct)
        row = self.chips // racks
        pitch = min(136.0, (_WIDTH - 2 * _MARGIN) / row)
        width = pitch * (0.84 if pitch < 60 else 0.8)
        height = 62.0 if width < 24 else 58.0 if width < 100 else 110.0
        left = (_WIDTH - pitch * row + pitch - width) / 2
        bar, long_port, short_port, apart = 24.0, 30.0, 18.0, 84.0
        two = len(switches) > 1
        deep = (bar + long_port) + height + ((short_port + bar) if two else 0)

        def across(chip: int) -> float:
            return left + chip % row * pitch

        def top(rack: int) -> float:
            start = y + rack * (deep + apart)
            mirrored = rack % 2 and two
            return start + ((short_port + bar) if mirrored else (bar + long_port))

        for dim in direct:  # First, to run behind the switches.
            for link in self.topology.links():
                if link.dim == dim.name:
                    assert isinstance(link.b, int)
                    x = across(link.a) + width * 0.72
                    path = f"M{x:.1f} {top(link.a // row) + height:.1f}V{top(link.b // row):.1f}"
                    self.line(path, self.axes(dim, link.a, link.b), width=max(1.2, width / 24))
        for rack in range(racks):
            mirrored = bool(rack % 2) and two
            for dim in switches:
                outer = dim is switches[0]
                up = outer != mirrored
                size = dim.size * (1 if dim is switches[-1] else math.prod(d.size for d in switches[1:]))
                port = long_port if outer else short_port
                edge = top(rack) if up else top(rack) + height
                start = edge - port - bar if up else edge + port
                for chip in range(rack * row, (rack + 1) * row):
                    x = across(chip) + width * (0.5 if outer else 0.28)
                    path = f"M{x:.1f} {edge:.1f}v{-port if up else port}"
                    self.line(path, self.axes(dim, chip), width=max(1.4, width / 20))
                for number, first in enumerate(range(0, row, size)):
                    wide = size * pitch - (pitch - width)
                    self.rect("bar", across(first), start, wide, bar)
                    if outer:
                        where = f"{direct[0].name} {rack}: " if direct else ""
                        label = f"{where}{dim.name} switch, {amount(dim.bandwidth, 'B/s')} a chip"
                        self.text(across(first) + wide / 2, start + 16.5, label, size=12.5, anchor="middle")
                    else:
                        name = f"{switches[0].name} {number}"
                        self.text(across(first) + wide / 2, start + 16, name, size=min(12, wide / 6), anchor="middle")
            for i in range(row):
                chip = rack * row + i
                self.chip(chip, str(i % switches[-1].size if two else i), across(chip), top(rack), width, height)
        if direct or two:
            labels = [f"{dim.name}: direct links of {amount(dim.bandwidth, 'B/s')}" for dim in direct]
            labels += (
                [f"switch in each {switches[0].name}: {amount(switches[-1].bandwidth, 'B/s')} a chip"] if two else []
            )
            middle = y + deep + apart / 2 + 4
            self.note(_WIDTH / 2, middle if racks > 1 else y + deep + 20, "; ".join(labels), anchor="middle")
        return y + racks * deep + (racks - 1) * apart

    def network(self, y: float) -> float:
        dim = self.topology.dims[0]
        shown = min(dim.size, _MOST_UNITS)
        pitch = min(120.0, (_WIDTH - 2 * _MARGIN) / shown)
        left = (_WIDTH - pitch * shown) / 2
        per_unit = self.topology.cores // self.topology.count
        for unit in range(shown):
            x = left + unit * pitch
            self.line(f"M{x + pitch / 2:.1f} {y + 22:.1f}v16", self.axes(dim, unit * self.chips), kind="network")
            self.rect("chip", x + 4, y + 38, pitch - 8, 38)
            self.text(x + pitch / 2, y + 54, f"unit {unit}", size=11.5, anchor="middle", weight="bold")
            numbers = spans(range(unit * per_unit, (unit + 1) * per_unit))
            self.text(x + pitch / 2, y + 69, numbers, size=10.5, anchor="middle", quiet=True)
        self.rect("bar", left + 4, y, pitch * shown - 8, 22)
        more = f"; the first {shown} of {dim.size} units" if shown < dim.size else ""
        label = f"{dim.description}: {amount(dim.bandwidth, 'B/s')} a chip{more}"
        self.text(_WIDTH / 2, y + 15.5, label, size=12.5, anchor="middle")
        return y + 76

    def legend(self, y: float) -> float:
        rows = [
            (self.hues[dim.name], dim.name, kind_in_words(dim), rate_in_words(dim), dim.description)
            for dim in (self.topology.dims if self.placement is None else ())
        ]
        for axis in self.placement.axes if self.placement is not None else ():
            words = ", ".join(map(part_in_words, axis.parts))
            where = f"on {words if len(words) < 48 else ', '.join(axis.parts)}"
            way = f"{'a' if axis.ring else 'no'} ring, {axis.hops} hop{'s' * (axis.hops > 1)} at most"
            rate, about = f"{amount(axis.bandwidth, 'B/s')} a core", way if axis.hops else "inside a chip"
            rows.append((COLOURS[axis.axis], f"{axis.axis} = {axis.size}", where, rate, about))
        for colour, name, where, rate, about in rows:
            self.parts.append(f'<rect x="{_MARGIN}" y="{y - 11:.1f}" width="14" height="14" rx="3" fill="{colour}"/>')
            self.text(_MARGIN + 24, y, name, weight="bold")
            self.text(_MARGIN + 150, y, where)
            self.text(_MARGIN + 510, y, rate)
            self.text(_MARGIN + 670, y, about, quiet=True)
            y += 23
        wraps = len(self.dims) > 1 and any(dim.wraps for dim in self.dims[-2:])
        ends = " A dot ends a link that goes around to the other side." if wraps else ""
        self.text(_MARGIN, y + 2, f"Bandwidth in one direction.{ends}", size=12, quiet=True)
        return y + 20
