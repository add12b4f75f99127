from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One kind of device: what must be true before `import jax`, and what the device can do."""

    name: str
    """JAX's platform name."""
    environment: dict[str, str]
    """Environment variables set, where the user has not set them, before jax is imported."""
