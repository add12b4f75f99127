"""Callbacks: code of a script that hears of its run, and may stop it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainfw.errors import RunError
from trainfw.objectives import Metrics
from trainfw.pieces import name_of
from trainfw.program import TrainState
from trainfw.training.evaluation import Validation
from trainfw.training.stopping import Asked


class Callback:
    """Code that hears of a run. Override what is needed; to stop the run, return the reason.

    A run that is stopped so is saved, validated and ends as if it were done; the same script goes on with it. An
    exception stops and saves it too, and is then raised as a RunError. Of several processes each calls its own, and all
    stop at the same step when one asks for it.
    """

    def step(self, step: int, metrics: Metrics) -> str | None:
        """Hear that a step is done. A metric is a Mean, read by `metrics["loss"].value()`.

        Steps are dispatched ahead: up to two later ones may be under way. The state is theirs by then.
        """
        return None

    def validation(self, step: int, validation: Validation, state: TrainState) -> str | None:
        """Hear what a validation found of this state, which the next step uses up: copy what is to be kept."""
        return None

    def save(self, step: int, path: Path) -> str | None:
        """Hear that a checkpoint is being written to `path`, in the background; at `end` it is whole."""
        return None

    def end(self, step: int, state: TrainState) -> None:
        """Hear that the run is done or was stopped by a callback, at this state, with everything saved."""


class Callbacks:
    """All of a run's callbacks, and what they have asked for."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = callbacks
        self.asked: Asked | None = None
        """A stop that a callback of this process asked for, of all."""
        self._error: Exception | SystemExit | None = None

    def tell(self, event: str, step: int, *data: Any) -> None:
        """Call every callback; the first that returns a reason, or fails, asks for a stop."""
        for callback in self._callbacks:
            asks = f"{name_of(callback).partition(':')[2]} at step {step}"
            try:
                reason = getattr(callback, event)(step, *data)
            except (Exception, SystemExit) as error:  # to leave would be to end well
                self.failed(f"callback {asks}: {event}: {type(error).__name__}: {error}", error)
            else:
                if reason and self.asked is None:
                    self.asked = Asked(f"{asks}: {reason}")

    def failed(self, what: str, error: Exception | SystemExit) -> None:
        """Ask for a stop because a script's own code failed: what was learnt is saved before `refuse` says so."""
        self._error = self._error or error
        if self.asked is None or not self.asked.failed:  # it is more than a stop that was asked for
            self.asked = Asked(what, failed=True)

    def failure(self) -> str:
        """Return what has failed here; empty where nothing has."""
        return self.asked.reason if self.asked is not None and self.asked.failed else ""

    def refuse(self, failures: Sequence[str]) -> None:
        """Raise RunError where a script's own code has failed in any process."""
        if said := next(filter(None, failures), ""):
            raise RunError(f"{said}; what was saved is kept") from self._error
