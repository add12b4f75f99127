from __future__ import annotations

import typer

from trainfw.cli.options import Devices, Overrides, RunPath, Step


def evaluate(run: RunPath, overrides: Overrides = None, devices: Devices = None, step: Step = None) -> None:
    """Validate a run on its held-out documents, or on those of another source (data.source=...)."""
    from trainfw import backends

    backends.prepare(devices)

    from trainfw import training
    from trainfw.cli.console import make_reporter

    reporter = make_reporter()
    try:
        validation, data = training.evaluate(run, overrides or (), step=step, reporter=reporter)
    finally:
        reporter.close()
    gzip = f"; gzip -9 reaches {data.gzip_bits_per_byte:.3f}" if validation.complete else ""
    typer.echo(f"{run}: {validation}{gzip}")
