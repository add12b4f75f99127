from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean as (total, count), so that means merge rightly across devices, microbatches and batches."""

    total: Any
    count: Any

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """On the host; 0 where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else 0.0
