from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from trainfw.models import AdapterInputs
from trainfw.objectives.schema import Schema


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


Metrics: TypeAlias = dict[str, Mean]
Sums: TypeAlias = dict[str, Any]
"""Metrics on their way: a `Mean` or `Statistics` by name, to be added over microbatches and devices."""


def metrics_of(sums: Sums) -> Metrics:
    """Return the metrics of sums that have been added up: a Mean under its name, statistics under their metrics'."""
    metrics = {name: value for name, value in sums.items() if isinstance(value, Mean)}
    for value in (value for value in sums.values() if not isinstance(value, Mean)):
        metrics |= {name: Mean(*pair) for name, pair in value.metrics().items()}
    return metrics


Batch: TypeAlias = dict[str, Any]
"""The arrays of a batch by name, as the objective's schema has them: all of a global batch, or a device's part."""

Models: TypeAlias = Mapping[str, Any]
"""`learner`, and each of an objective's roles: a `TokenModel`, or a `DenoisingModel` where images are read."""
Reads: TypeAlias = Literal["tokens", "images"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """Source of a loss's random draws, and whether it is the loss of training."""

    training: bool = field(metadata={"static": True})
    """False in validation, which leaves out what is there for training alone."""
    key: jax.Array | None = None
    """State of the `rbg` generator for dropout, u32[4]; None where nothing is dropped."""
    ids_B: jax.Array | None = None
    """Numbers of this device's rows (of the dim `batch`) that no two microbatches or devices share, i32."""

    def of_groups(self, size: int) -> Draw:
        """Return that of the `size` rows of each group, one after the other."""
        if self.ids_B is None:
            return self
        ids = self.ids_B[:, None] * size + jnp.arange(size, dtype=jnp.int32)
        return replace(self, ids_B=ids.reshape(-1))

    @property
    def adapters(self) -> AdapterInputs | None:
        """Return the inputs of adapters, where these drop anything."""
        return None if self.key is None else AdapterInputs(key=self.key, ids_B=self.ids_B)


class Objective(Protocol):
    """A loss over a batch, with the frozen models that it needs; one of images is an `ImageObjective`.

    It is called on every device, on that device's part of everything; collectives over the mesh's axes are those of
    `trainfw.parallel`, which do nothing outside of it.
    """

    unit: ClassVar[str]
    """Name of what `loss` counts, such as `token`."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Frozen models beside the learner, such as `reference`; none for pretraining."""

    def schema(self, batch: int, sequence: int) -> Schema:
        """Return the arrays that `loss` reads of `batch` rows or groups of `sequence` tokens.

        Of images, sizes are the model's; its `sequence` is then the number of patches, which `Schema.tokens` counts.
        """

    def loss(self, models: Models, batch: Batch, draw: Draw) -> tuple[jax.Array, Sums]:
        """Return this device's part of the summed loss, which is differentiated, and what is logged.

        `models` has `learner` and each of `roles`. The sums hold `loss`, a Mean whose count over all devices divides
        the gradients. Devices along `tensor`, which compute the same tokens, each return their share of both.
        """


class ImageObjective(Objective, Protocol):
    """A loss over a batch of images. One of your own is made with the model's `ImageShape`, before its options."""

    reads: ClassVar[Literal["images"]]
    """`images`; an objective that does not say reads packed tokens."""

    def drawn(self, batch: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Return the arrays of the schema for a batch as the data gives it: on the host, before each step.

        All that is random is drawn here, for each row by `seed` and its number in the endless order of rows, `row`
        (int64), and by nothing else: it is the same on every mesh and after every resume. `row` is no array of the
        schema. An objective of your own need not have this: its schema is then `image_rows`.
        """


def reads_of(objective: Objective | type[Objective]) -> Reads:
    """Return the rows that an objective, or a class of them, reads; tokens where it does not say."""
    return getattr(objective, "reads", "tokens")


def drawn_batch(objective: Objective, batch: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Return the arrays of an objective's schema for a batch as the data gives it; see `ImageObjective.drawn`."""
    if (drawn := getattr(objective, "drawn", None)) is not None:
        return dict(drawn(batch, seed))
    return {name: array for name, array in batch.items() if name != "row"}
