from __future__ import annotations

from trainfw.cli.options import Devices, Overrides, RunPath, Step
from trainfw.cli.terminal import say


def evaluate(run: RunPath, overrides: Overrides = None, devices: Devices = None, step: Step = None) -> None:
    """Validate a run on its held-out documents. With data.source=..., on those of another source."""
    from trainfw import backends

    backends.prepare(devices)

    from trainfw import training
    from trainfw.cli.console import make_reporter

    reporter = make_reporter()
    try:
        validation, data = training.evaluate(run, overrides or (), step=step, reporter=reporter)
    finally:
        reporter.close()
    say(f"{run}: {validation}{validation.beside_gzip(data)}")
