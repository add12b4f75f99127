"""A loss that grows, and stays so, is told once; one that comes back, or was next to nothing, is not."""

from __future__ import annotations

import pytest

from trainfw.training.faults import Growth

LOSSES = {
    "the rate is too high": ([5.5] * 3 + [700.0] * 20, [10]),
    "what was learnt is lost": ([8.0] * 5 + [0.5] * 20 + [9.0] * 20, [31]),
    "a spike that comes back": ([5.5] * 15 + [700.0] * 4 + [5.0] * 15, []),
    "learnt by heart, then not quite": ([5.5] * 10 + [0.001] * 20 + [0.5] * 20, []),
    "next to nothing from the start": ([0.001] * 10 + [0.05] * 20, []),
    "a short run is judged at its end": ([5.5, 80.0, 90.0, 95.0], [4]),
    "no finite loss": ([float("nan")] * 20, []),
}


@pytest.mark.parametrize("name", LOSSES)
def test_growth(name):
    losses, told = LOSSES[name]
    growth = Growth()
    steps = [n for n, loss in enumerate(losses, start=1) if growth.seen(loss, last=n == len(losses))]
    assert steps == told
