from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainfw import hardware, parallel, report
from trainfw.cli.terminal import folded, say, width_of
from trainfw.errors import UserError, did_you_mean
from trainfw.unfinished import write_text

if TYPE_CHECKING:
    from rich.text import Text


def topology(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Left out, all are listed.")] = None,
    count: Annotated[int, typer.Option("--count", help="That many of it, joined by its network.")] = 1,
    lnc: Annotated[int | None, typer.Option("--lnc", help="Physical NeuronCores in a logical one.")] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", metavar="AXIS=N,...", help="Mesh axes to place, such as tensor=4,fsdp=-1.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Also write a picture.")] = None,
) -> None:
    """Draw a hardware topology, and where a layout lies on it."""
    if name is None:
        if layout is not None or svg is not None or count != 1 or lnc is not None:
            raise UserError(
                "--count, --lnc, --layout and --svg need the name of a topology; `trainfw topology` lists them"
            )
        _print(report.list_topologies())
        return
    found = hardware.load_topology(name, count=count, lnc=lnc)
    placement = None if layout is None else parallel.place(found, parse_layout(layout, found))
    width = min(report.WIDTH, width_of(sys.stdout)) if sys.stdout.isatty() else report.WIDTH
    _print(report.describe_topology(found, width=width))
    say()
    if placement is not None:
        _print(report.describe_placement(placement))
        say()
    _print(report.draw_topology(found, placement, width=width))
    say()
    _print(report.doubtful_figures(found, width=width))
    if svg is not None:
        write_text(svg, report.topology_svg(found, placement))
        say(f"\nwrote {svg}")


def parse_layout(text: str, topology: hardware.Topology) -> parallel.Layout:
    """Parse `tensor=4,fsdp=-1` for a topology: one axis may be -1, as fsdp is when left out, to fill.

    Raises UserError for an unknown axis, a size that is none, or a product that is not the number of cores.
    """
    from pydantic import ValidationError

    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals:
            raise UserError(f"--layout {text}: {part!r}: expected axis=size, such as tensor=4,fsdp=-1")
        if axis not in parallel.AXES:
            raise UserError(f"--layout {text}: unknown axis {axis!r}{did_you_mean(axis, parallel.AXES)}")
        if axis in sizes:
            raise UserError(f"--layout {text}: {axis} is given twice")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"--layout {text}: {axis} = {size!r}: expected an integer") from None
    if -1 in sizes.values():
        sizes.setdefault("fsdp", 1)
    elif "fsdp" not in sizes:
        sizes["fsdp"] = -1
    try:
        config = parallel.ParallelConfig(**sizes)  # type: ignore[arg-type]  # of integers alone
    except ValidationError as error:
        raise UserError(f"--layout {text}: {error.errors()[0]['msg']}") from None
    fixed = math.prod(size for size in sizes.values() if size != -1)
    spelled = " * ".join(f"{axis}({size})" for axis, size in sizes.items() if size != -1)
    if topology.cores % fixed or (-1 not in sizes.values() and fixed != topology.cores):
        fits = "does not divide" if topology.cores % fixed else "is not"
        of = f"{topology.count} x {topology.name}"
        raise UserError(f"--layout {text}: {spelled} = {fixed} {fits} the {topology.cores} cores of {of}")
    return parallel.Layout.resolve(config, topology.cores)


def _print(lines: Iterable[Text]) -> None:
    """Print lines: in colour on a terminal and folded to its width, as plain text in a pipe."""
    from rich.console import Console
    from rich.text import Text

    if not sys.stdout.isatty():
        for line in lines:
            say(line.plain.rstrip())
        return
    console = Console(highlight=False)
    for line in lines:
        first, *more = folded(line.plain, width_of(sys.stdout))
        console.print(line[: len(first)], soft_wrap=True)
        for part in more:
            console.print(Text(part, style=line.style), soft_wrap=True)
