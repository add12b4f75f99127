"""Servers for hardware that is not there, as `plan --serve` and `check --serve` are asked for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from trainfw import backends, hardware, serving
from trainfw.cli.options import check_choice
from trainfw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from trainfw.program import Server


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
        raise UserError(f"--hardware {name}: unknown topology{did_you_mean(name, known)}")
    topology = hardware.load_topology(name, count=count or 1)
    if topology.cores > backends.MAX_SIMULATED:
        raise UserError(f"--count {count}: is {topology.cores:,} cores; {backends.MAX_SIMULATED:,} can be simulated")
    return topology


def build_server_for(asked: serving.Serving, topology: hardware.Topology, progress: Callable[[str], None]) -> Server:
    """Build a server on as many simulated devices as the topology has cores. Starts jax."""
    if not backends.started():
        backends.prepare(topology.cores, as_backend=topology.rules)
    progress(f"building a server of {asked.model}, {asked.slots:,} slots a copy, for {topology.cores} cores")
    return serving.build_absent(asked, topology)
