from __future__ import annotations

import json
import os
import shlex
import textwrap
from dataclasses import asdict, replace
from typing import Annotated

import typer

from trainfw import backends, hardware, parallel
from trainfw.cli.options import Overrides, RecipePath, load
from trainfw.cli.terminal import say
from trainfw.errors import UserError


def env(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(help="Instances (default: from Slurm or Kubernetes, else the topology's).")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="Which of them this is (default: as above, else 0).")] = None,
    head: Annotated[str | None, typer.Option(help="The host of process 0.")] = None,
    format: Annotated[str, typer.Option(metavar="sh|json", help="For a shell to read, or for a program.")] = "sh",
) -> None:
    """Print the environment of a process on Neuron, with reasons. It is what the process sets before it imports jax."""
    if format not in ("sh", "json"):
        raise UserError(f"--format {format}: expected sh or json")
    loaded = load(recipe, overrides)
    topology = loaded.hardware.load()
    if topology is None:
        raise UserError(f"{recipe}: hardware.topology must say what the environment is for, such as trn2.48xlarge")
    wiring = _wiring(topology, nodes, node_rank, head)
    variables: list[backends.Variable] = []
    if backends.for_topology(topology).has_sdk:
        for warning in backends.environment_warnings(os.environ, backends.load_sdk(loaded.hardware.sdk), topology):
            say(f"warning: {warning}", err=True)
        layout, scan_layers = {axis: getattr(loaded.parallel, axis) for axis in parallel.AXES}, loaded.train.scan_layers
        variables = backends.neuron_environment(loaded.hardware, wiring, layout=layout, scan_layers=scan_layers)
    if format == "json":
        typer.echo(json.dumps([asdict(variable) for variable in variables], indent=2))
        return
    where = f"process {wiring.process_index} of {wiring.process_count} (from {wiring.launcher})"
    typer.echo(_comment(f"{loaded.name} on {topology.count} x {topology.name}: {where}"))
    if not variables:
        typer.echo(f"# nothing to set: {topology.name} is not Neuron hardware")
    for variable in variables:
        typer.echo(f"\n{_as_shell(variable)}")


def _wiring(topology: hardware.Topology, nodes: int | None, node_rank: int | None, head: str | None) -> backends.Wiring:
    if nodes is None and node_rank is None:
        wiring = backends.read_wiring(os.environ, topology)
        if wiring == backends.Wiring():
            wiring = backends.Wiring(0, topology.instances, launcher="nothing but the topology")
        return wiring if head is None else replace(wiring, head=head)
    count, index = topology.instances if nodes is None else nodes, node_rank or 0
    if count < 1:
        raise UserError(f"--nodes {count}: expected at least 1")
    if not 0 <= index < count:
        raise UserError(f"--node-rank {index}: expected 0 to {count - 1}, since there are {count} nodes")
    return backends.Wiring(index, count, head, "the command line")


def _as_shell(variable: backends.Variable) -> str:
    name, marked = variable.name, "experimental: " if variable.experimental else ""
    comment = _comment(f"{marked}{variable.reason} ({variable.source})")
    if variable.removed:
        return f"{comment}\nunset {name}"
    if variable.value is None:
        return f"{comment}\n# {name} is not known here"
    before = f'"${{{name}:+:${name}}}"' if variable.prepended else ""
    return f"{comment}\nexport {name}={shlex.quote(variable.value)}{before}"


def _comment(text: str) -> str:
    """Write `text` as comments of a shell that fit on any screen; a source's path is never broken."""
    return textwrap.fill(
        text, 80, initial_indent="# ", subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False
    )
