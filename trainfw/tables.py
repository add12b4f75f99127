"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str] | str], align: str) -> list[str]:
    """Lay out rows of cells, the heads first, in columns as wide as what they hold, two spaces apart.

    Args:
        rows: a row that is a str is a line of its own, and takes no part in the widths.
        align: `<` or `>` for each column.
    """
    rows = list(rows)
    cells = [row for row in rows if not isinstance(row, str)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        row
        if isinstance(row, str)
        else "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]
