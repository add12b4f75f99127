"""Servers for hardware that is not there, as `plan --serve` and `check --serve` are asked for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfw import backends, hardware, planning, serving
from trainfw.cli.options import check_choice
from trainfw.cli.terminal import Clock, say
from trainfw.errors import UserError, did_you_mean
from trainfw.unfinished import write_text

if TYPE_CHECKING:
    from trainfw.program import Server


SEARCHED_SLOTS = "1,8,32"
"""Numbers of slots of a group of cores that a search tries, where none are given."""


def check_alone(options: Mapping[str, object]) -> None:
    """Raise UserError where one of these options is given, which go with --serve."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name}: goes with --serve")


def slot_counts(text: object) -> list[int]:
    """Read `8`, or `1,8,32`. Raises UserError."""
    counts = [int(part) for part in str(text).split(",") if part.isdecimal()]
    if not counts or len(counts) != len(str(text).split(",")) or min(counts) < 1:
        raise UserError(f"--slots {text}: expected a number, at least 1, or several: 1,8,32")
    return counts


def serving_of(model: str, options: Mapping[str, object]) -> serving.Serving:
    """Return what is asked for, of the options that are given. Raises UserError for values that make no sense."""
    weights, cache, length = options["--weights"], options["--cache"], options["--length"]
    check_choice("--weights", None if weights is None else str(weights), "float32", "bfloat16", "int8", "nf4")
    check_choice("--cache", None if cache is None else str(cache), "float32", "bfloat16", "int8")
    given = {"weights": weights, "cache": cache, "length": length}
    layout = {} if options["--layout"] is None else serving.read_layout(str(options["--layout"]))
    counts = slot_counts(options["--slots"] or 8)
    kept = {name: value for name, value in given.items() if value is not None}
    return serving.Serving(model, layout, slots=counts[0], **kept)  # type: ignore[arg-type]


def topology_to_serve(name: str | None, count: int | None) -> hardware.Topology:
    """Load the topology that a server is for. Raises UserError where there is none, or it is too large to simulate."""
    known = hardware.topology_names()
    if name is None:
        raise UserError(f"--serve: expected --hardware, one of {', '.join(known)}")
    if not name.endswith(".yaml") and name not in known:
        near = did_you_mean(name, known) or f"; one of: {', '.join(known)}"
        raise UserError(f"--hardware {name}: unknown topology{near}")
    topology = hardware.load_topology(name, count=count or 1)
    if topology.cores > backends.MAX_SIMULATED:
        raise UserError(f"--count {count}: is {topology.cores:,} cores; {backends.MAX_SIMULATED:,} can be simulated")
    return topology


def build_server_for(asked: serving.Serving, topology: hardware.Topology, progress: Callable[[str], None]) -> Server:
    """Build a server on as many simulated devices as the topology has cores. Starts jax."""
    _simulate(topology)
    progress(f"building a server of {asked.model}, {asked.slots:,} slots a copy, for {topology.cores} cores")
    return serving.build_absent(asked, topology)


def _simulate(topology: hardware.Topology) -> None:
    if not backends.started():
        backends.prepare(topology.cores, as_backend=topology.rules)


def plan_server(
    model: str,
    topology: hardware.Topology,
    options: Mapping[str, object],
    tokens: tuple[int, int],
    scale: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print the plan of a server, for prompts and answers of so many `tokens`."""
    asked, (prompt, output) = serving_of(model, options), tokens
    rate = None if scale is None else _rate(scale)
    with Clock() as progress:
        made = planning.plan_server(
            lambda count: build_server_for(replace(asked, slots=count), topology, progress),
            topology,
            model=model,
            slots=slot_counts(options["--slots"] or 8),
            prompt=prompt,
            output=output,
            progress=progress,
        )
    fleets = [] if rate is None else [planning.fleet(estimate, rate) for estimate in made.estimates]
    found = [{"units": units, "dollars_per_hour": dollars} for units, dollars in fleets]
    say(json.dumps(made.to_json() | ({"fleets": found} if fleets else {}), indent=2) if as_json else made)
    _write_page(html, made)
    for estimate, (units, dollars) in zip(made.estimates, fleets if not as_json else ()):
        paid = "no price is known" if dollars is None else f"{dollars:,.2f} dollars an hour"
        free = f"{planning.HEADROOM:.0%} left free"
        asked_for = f"{rate:g} requests/s with {estimate.load.slots:,} slots, {free}"
        say(f"{asked_for}: {units:,} {topology.name}, {paid}")


def search_servers(
    model: str,
    topology: hardware.Topology,
    options: Mapping[str, object],
    tokens: tuple[int, int],
    scale: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print what a search for a server's layout found; exit with 1 where nothing fits."""
    if options["--layout"] is not None:
        raise UserError("--search looks for the layout: give it without --layout")
    if scale is not None:
        raise UserError("--scale is of one layout: give it without --search, with the --layout that the search finds")
    asked, counts = serving_of(model, options), slot_counts(options["--slots"] or SEARCHED_SLOTS)
    with Clock() as progress:
        _simulate(topology)
        found = planning.search_servers(asked, topology, counts, prompt=tokens[0], output=tokens[1], progress=progress)
    say(json.dumps(found.to_json(), indent=2) if as_json else found)
    _write_page(html, found)
    if not found.fitting:
        raise typer.Exit(1)


def _write_page(file: Path | None, found: planning.ServerPlan | planning.FoundServers) -> None:
    if file is not None:
        write_text(file, found.page())
        say(f"wrote {file}", err=True)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"--scale {text}: expected requests a second, with --serve; more than 0")
    return rate
