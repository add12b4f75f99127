from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Backend:
    """One kind of device, and how programs are compiled for it."""

    name: str
    """JAX's platform name."""
    compiler_options: dict[str, str] = field(default_factory=dict)
    """XLA options with which the training step is compiled."""
