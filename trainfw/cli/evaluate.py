from __future__ import annotations

import contextlib

from trainfw import backends, training
from trainfw.cli.console import make_reporter
from trainfw.cli.options import Devices, Overrides, RunPath, Step, Which
from trainfw.cli.terminal import say


def evaluate(
    run: RunPath, overrides: Overrides = None, devices: Devices = None, step: Step = None, which: Which = None
) -> None:
    """Validate a run on its held-out documents. With data.source=..., on those of another source."""
    backends.prepare(devices)
    with contextlib.closing(make_reporter()) as reporter:
        validation, data = training.evaluate(run, overrides or (), step=step, weights=which, reporter=reporter)
    say(f"{run}: {validation}{validation.beside_gzip(data)}")
