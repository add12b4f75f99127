"""A backend, an optimizer, an objective and a source of data that are none of trainfw's, in this file alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import optax

from trainfw.backends import Backend
from trainfw.objectives import NextToken

TOY = Backend("toy", "toy", host_init=True, top_k="iterative")


def scaled_signs(learning_rate, *, scale):
    return optax.chain(optax.scale_by_sign(), optax.scale(scale), optax.scale_by_learning_rate(learning_rate))


@dataclass(frozen=True)
class Doubled:
    """Twice the next token's loss."""

    factor: float = 2.0
    unit = "token"
    roles = ()

    def schema(self, batch, sequence):
        return NextToken().schema(batch, sequence)

    def loss(self, models, batch, draw):
        loss, sums = NextToken().loss(models, batch, draw)
        return loss * self.factor, sums


def rows():
    """Give the same rows every time."""
    return ({"text": f"number {number} and {number * number}", "other": number} for number in range(300))


def fails_late():
    yield {"text": "one"}
    raise LookupError("no more")


OTHERS = {
    "nothing": lambda: None,
    "number": lambda: 3,
    "letters": lambda: "letters",
    "fails": lambda: 1 / 0,
    "fails_late": fails_late,
    "leaves": lambda: sys.exit(0),
    "broken": lambda: ["whole", "bro\udc00ken"],
}
"""Functions that are no good as a source."""
globals().update(OTHERS)
