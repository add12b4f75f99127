from __future__ import annotations

from pydantic import Field

from trainfw.config import Config


class CheckpointConfig(Config):
    """When to save, and what to keep. The last step is always saved."""

    every: int = Field(default=1000, ge=0)
    """Save after every this many steps; 0: only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Keep this many of the newest checkpoints."""
    keep_every: int | None = Field(default=None, ge=1)
    """Beyond those, keep every checkpoint whose step is a multiple of this."""
    max_failures: int = Field(default=3, ge=0)
    """Saves in a row that may fail (a full disk, a store that does not answer) before the run does. The last save of
    a run may not."""
