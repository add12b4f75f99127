from __future__ import annotations

from typing import Annotated

import typer

from trainfw.cli.options import Overrides
from trainfw.cli.terminal import Clock, say

_Recipe = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or a bundled recipe by name.", show_default=False)
]


def check(
    recipe: _Recipe = None,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None, typer.Option(help="The topology to check for (default: the recipe's).", show_default=False)
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many of it (default: the recipe's; 1 with --hardware).", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List every rule with its severity and source.")] = False,
) -> None:
    """Read a recipe's steps for what Neuron is known to refuse. Before renting it; no data is needed.

    Exits 0 when nothing is refused (there may be warnings), 1 when something is.
    """
    if rules:
        _print_rules(json_)
        return
    from trainfw import backends
    from trainfw.errors import UserError
    from trainfw.hardware import topology_names
    from trainfw.recipe import load_recipe

    if recipe is None:
        raise UserError("check: expected a RECIPE (or --rules)")
    chosen = list(overrides or ())
    if hardware is not None:
        chosen += [f"hardware.topology={hardware}", f"hardware.count={1 if count is None else count}"]
    elif count is not None:
        chosen.append(f"hardware.count={count}")
    loaded = load_recipe(recipe, chosen)
    topology = loaded.hardware.load()
    if topology is None:
        raise loaded.error(
            "hardware.topology",
            f"nothing to check for; name it with --hardware: {', '.join(topology_names())}",
        )
    if topology.cores > backends.MAX_SIMULATED:
        most = backends.MAX_SIMULATED
        raise loaded.error(
            "hardware.count",
            f"{topology.name} x {topology.count} has {topology.cores:,} cores; a check simulates {most:,} at most; "
            f"try --count {most * topology.count // topology.cores}",
        )
    sdk = backends.load_sdk(loaded.hardware.sdk)
    with Clock() as progress:
        backends.prepare(topology.cores, as_backend="neuron" if topology.rules == "neuron" else None)
        progress(f"building {loaded.name} for {topology.cores} cores")

        from trainfw.checking import check_program
        from trainfw.program import build_program

        report = check_program(build_program(loaded), topology=topology, sdk=sdk, progress=progress)
    if json_:
        import json

        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        say(report)
    if not report.ok:
        raise typer.Exit(1)


def _print_rules(as_json: bool) -> None:
    from trainfw.checking import RULES

    if as_json:
        import json

        typer.echo(json.dumps([rule.model_dump(exclude={"hides"}) for rule in RULES.values()], indent=2))
        return
    for rule in RULES.values():
        say(f"{rule.severity:7}  {rule.id}\n{'':7}  {rule.summary}\n{'':7}  {rule.source}")
