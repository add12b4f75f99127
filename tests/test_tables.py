from __future__ import annotations

from trainfw.tables import table


def test_columns_are_as_wide_as_what_they_hold():
    rows = [
        ("name", "of", "note"),
        ("all-gather", "1,024", ""),
        "a line, longer than a row",
        ("x", "8", "slow"),
    ]
    assert table(rows, "<><") == [
        "name           of  note",
        "all-gather  1,024",
        "a line, longer than a row",
        "x               8  slow",
    ]
