"""benchmarks/decode_accuracy.py: the rule, and that the chips' files hold what it fits."""

from __future__ import annotations

import pytest

from benchmarks import decode_accuracy as accuracy
from trainfw.hardware import load_topology

ROWS = accuracy.published("neuron_decoding.csv")


def test_every_third_row_is_kept_out():
    assert len(ROWS) == 34
    assert [i + 1 for i, row in enumerate(ROWS) if row.kept_out] == list(range(3, 34, 3))
    keys = [(r.instance, r.model, r.weights, r.rows, r.sequence_length, r.prompt) for r in ROWS]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("topology", "rows", "one_share"),
    [
        ("inf2.48xlarge", [row for row in ROWS if not row.kept_out], False),
        ("trn1.32xlarge", [row for row in ROWS if not row.kept_out], False),
        ("c7g.16xlarge", [row for row, _ in accuracy.graviton() if not row.kept_out], True),
        ("c8g.24xlarge", [row for row, _ in accuracy.graviton() if not row.kept_out], True),
    ],
)
def test_chips_have_the_fitted_figures(topology, rows, one_share):
    figures = load_topology(topology).figures
    held = [figures[f"chip.serving.{name}"].number for name in accuracy.FIGURES]
    assert held == pytest.approx(accuracy.fitted(rows, one_share=one_share), rel=5e-3)


def test_a_pair_counts_where_a_row_is_kept_out():
    time = {row: row.tpot for row in ROWS}
    pairs = accuracy.pairs(ROWS, time)
    assert all(right for *_, right in pairs)
    assert all(a.kept_out or b.kept_out for a, b, _ in pairs)
    assert not any(right for a, b, right in accuracy.pairs(ROWS, {row: -row.tpot for row in ROWS}) if a.tpot != b.tpot)
