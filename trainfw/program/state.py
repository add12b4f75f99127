from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TrainState:
    """Everything that one step hands to the next, and that a checkpoint holds.

    Leaves are arrays, or what describes them: ShapeDtypeStructs, shardings.
    """

    step: Any
    """Updates done, an int32 scalar."""
    params: Any
    """Nested dict of float32 arrays: what learns."""
    opt_state: Any
    rng: Any
    """Key data for what a step draws (the step folds its number in)."""
    frozen: Any = field(default_factory=dict)
    """Nested dicts of what does not learn, by role (`base` of an adapter, `reference`): arrays or `Quantized`. Not in
    checkpoints."""
    guard: Any = field(default_factory=dict)
    """Memory of good steps for `faults.spike_sigma` (`start_guard`); else empty."""

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        size = sum(getattr(leaf, "size", 0) for leaf in leaves)
        return f"<TrainState: {size:,} parameters in {len(leaves)} arrays>"
