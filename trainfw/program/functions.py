from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from trainfw import backends


@dataclass(frozen=True)
class Function:
    """One jitted entry of a program, which is run, planned, checked and measured."""

    name: str
    jitted: Any = field(repr=False)
    """The jax.stages.Wrapped."""
    arguments: tuple[Any, ...] = field(repr=False)
    """Pytrees of ShapeDtypeStructs with shardings: what it is compiled for."""

    def trace(self) -> jax.stages.Traced:
        """Return it traced for its arguments."""
        return self.jitted.trace(*self.arguments)

    def lower(self) -> jax.stages.Lowered:
        """Return it lowered for its arguments."""
        return self.jitted.lower(*self.arguments)

    def compile(self) -> Any:
        """Return it compiled ahead of time with the backend's options."""
        compiled = self.lower().compile(compiler_options={**backends.current().compiler_options})
        backends.release_freed_memory()
        return compiled


Functions = Mapping[str, Function]
"""Functions by name: `train` (state, batch) -> (state, metrics); `evaluate` (params, frozen, batch) -> metrics."""
