from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainfw import backends, checking, serving
from trainfw.cli.options import (
    Count,
    Hardware,
    Overrides,
    Serve,
    ServeCache,
    ServeLayout,
    ServeLength,
    ServeSlots,
    ServeWeights,
    Stage,
    check_page,
)
from trainfw.cli.serving import build_server_for, check_alone, serving_of, slot_counts, topology_to_serve
from trainfw.cli.signals import leaving_at_once
from trainfw.cli.simulated import build_for, compiler_options, load_simulated
from trainfw.cli.terminal import Clock, say
from trainfw.errors import UserError
from trainfw.unfinished import write_text

_Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or a bundled recipe by name.")]


def check(
    recipe: _Recipe = None,
    overrides: Overrides = None,
    hardware: Hardware = None,
    count: Count = None,
    stage: Stage = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
    serve: Serve = False,
    layout: ServeLayout = None,
    slots: ServeSlots = None,
    length: ServeLength = None,
    weights: ServeWeights = None,
    cache: ServeCache = None,
    rules: Annotated[bool, typer.Option("--rules", help="List every rule with its severity and source.")] = False,
    compiler: Annotated[
        bool,
        typer.Option(
            "--compiler",
            help="Also compile each step with the neuronx-cc on PATH: no Neuron hardware is needed. Not tried with the "
            "real compiler yet.",
        ),
    ] = False,
    compiler_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --compiler: the limit of one compile.")
    ] = 3600.0,
    report_difference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --compiler: write where check and the compiler differ, to be sent back: no paths, no data.",
        ),
    ] = None,
) -> None:
    """Read a recipe's steps for what Neuron is known to refuse. Before renting it; no data is needed.

    Exits 0 when nothing is refused (there may be warnings), 1 when something is, or the compiler fails.
    """
    if rules and json_:
        typer.echo(json.dumps([rule.to_json() for rule in checking.RULES.values()], indent=2))
        return
    if rules:
        for rule in checking.RULES.values():
            say(rule.describe())
        return
    if recipe is None:
        raise UserError("check: expected a RECIPE (or --rules)")
    if not compiler and report_difference is not None:
        raise UserError("--report-difference compares with the compiler: give it with --compiler")
    of_server = {"--layout": layout, "--slots": slots, "--length": length, "--weights": weights, "--cache": cache}
    if not serve:
        check_alone(of_server)
    elif compiler or overrides or stage:
        raise UserError("--serve: goes without --compiler, and without keys of a recipe")
    else:
        _check_server(serving_of(recipe, of_server), slots, hardware, count, json_)
        return
    if not 0 < compiler_timeout < float("inf"):
        raise UserError(f"--compiler-timeout {compiler_timeout:g}: expected seconds, more than 0")
    check_page("--report-difference", report_difference)
    loaded, topology = load_simulated(recipe, overrides or (), hardware, count, stage)
    flags = compiler_options(loaded, topology) if compiler else []
    if compiler:
        checking.find_compiler()  # before half a minute of work
    sdk = backends.load_sdk(loaded.hardware.sdk)
    found: checking.Comparison | None = None
    with Clock() as progress:
        program = build_for(loaded, topology, progress)
        report = checking.check_program(program, topology=topology, sdk=sdk, progress=progress)
        if compiler:
            with leaving_at_once("the compiler is ended, and nothing is written"):
                found = checking.compare_with_compiler(program, flags, compiler_timeout, report, progress)
    if json_:
        typer.echo(json.dumps(report.to_json() | (found.to_json() if found else {}), indent=2))
    else:
        say(report if found is None else f"{report}\n\n{found.text(sdk.packages['neuronx-cc'])}")
    if found is not None and report_difference is not None:
        write_text(report_difference, json.dumps(found.difference_report(loaded), indent=2) + "\n")
        say(f"wrote {report_difference}", err=True)
    if not report.ok or (found is not None and not found.passed):
        raise typer.Exit(1)


def _check_server(
    asked: serving.Serving, slots: str | None, hardware: str | None, count: int | None, as_json: bool
) -> None:
    if slots is not None and len(slot_counts(slots)) > 1:
        raise UserError(f"--slots {slots}: a check is of one number")
    topology = topology_to_serve(hardware, count)
    with Clock() as progress:
        server = build_server_for(asked, topology, progress)
        report = checking.check_program(server, topology=topology, progress=progress)
    say(json.dumps(report.to_json(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)
