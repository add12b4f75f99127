"""Arguments of `train`, all of them checked before anything is done with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import jax

from trainfw.errors import expect
from trainfw.objectives import Objective
from trainfw.optim import OwnOptimizer
from trainfw.paths import path_text
from trainfw.program import Program
from trainfw.training.callbacks import Callback
from trainfw.training.loggers import Logger
from trainfw.training.reporter import Reporter
from trainfw.training.resuming import check_accept
from trainfw.training.run_directory import Resume

_One = TypeVar("_One")
_HEARS = ("step", "validation", "save", "end")
_TAKES = ("write", "rewind")
_SPEAKS = ("note", "progress", "step", "row")


@dataclass(frozen=True)
class Given:
    """Arguments of `train` beside the recipe."""

    objective: Objective | None
    optimizer: OwnOptimizer | None
    data: Any
    callbacks: Sequence[Callback]
    loggers: Sequence[Logger]
    devices: Sequence[jax.Device] | None
    run_dir: str | Path | None
    resume: Resume
    accept: Sequence[str]
    reporter: Reporter
    approve: Callable[[Program], None] | None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        modes = get_args(Resume)
        named = isinstance(self.resume, str) and self.resume in modes
        expect("resume", self.resume, named, " or ".join(map(repr, modes)))
        keep("callbacks", listed("callbacks", self.callbacks, _having(_HEARS), "trainfw.Callback objects"))
        takes = "objects with write(rows) and rewind(step), such as trainfw.Logger objects"
        keep("loggers", listed("loggers", self.loggers, _having(_TAKES), takes))
        if self.devices is not None:
            expected = "devices, such as jax.devices()[:1]"
            devices = listed("devices", self.devices, lambda one: isinstance(one, jax.Device), expected, least=1)
            keep("devices", devices)
        accept = [self.accept] if isinstance(self.accept, str) else self.accept
        keep("accept", listed("accept", accept, lambda key: isinstance(key, str), "keys of the recipe"))
        check_accept(self.accept)
        if self.run_dir is not None:
            path_text(self.run_dir, "run_dir", "the path of a directory")
        expect("reporter", self.reporter, _having(_SPEAKS)(self.reporter), "a trainfw.training.Reporter object")
        expect("approve", self.approve, self.approve is None or callable(self.approve), "a function of the program")


def listed(
    name: str, given: Iterable[_One], fits: Callable[[_One], bool], expected: str, least: int = 0
) -> tuple[_One, ...]:
    """Return what a list, or an iterator, holds. Raises UserError where a part of it does not fit."""
    try:
        found = tuple(given)
    except TypeError:
        found = None
    expect(name, given, found is not None and len(found) >= least and all(map(fits, found)), f"a list of {expected}")
    return found or ()


def _having(methods: Sequence[str]) -> Callable[[object], bool]:
    """Make the test for an object, no class, with these methods."""
    return lambda one: not isinstance(one, type) and all(callable(getattr(one, name, None)) for name in methods)
