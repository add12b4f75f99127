from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

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
        """Return the mean, on the host; 0 where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else 0.0


class Statistics(Protocol):
    """A pytree of sums of which several metrics are made once they are added up, such as a router's."""

    def metrics(self) -> Mapping[str, tuple[jax.Array, jax.Array]]:
        """Return (total, count) of each metric by its name."""
        ...


Metrics: TypeAlias = dict[str, Mean]
Sums: TypeAlias = dict[str, Any]
"""Metrics on their way: a `Mean` or `Statistics` by name, to be added over microbatches and devices."""


def metrics_of(sums: Sums) -> Metrics:
    """Return the metrics of sums that have been added up: a Mean under its name, statistics under their metrics'."""
    metrics = {name: value for name, value in sums.items() if isinstance(value, Mean)}
    for value in (value for value in sums.values() if not isinstance(value, Mean)):
        metrics |= {name: Mean(*pair) for name, pair in value.metrics().items()}
    return metrics
