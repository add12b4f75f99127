from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainfw.hardware.figures import Figure, quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("96 GiB", 96 * 2**30),
        ("80 GB", 80e9),
        ("2.9 TB/s", 2.9e12),
        ("200 Gbit/s", 25e9),
        ("13,120 GiB/s", 13120 * 2**30),
        ("667 TFLOP/s", 667e12),
        ("20.8 PFLOP/s", 20.8e15),
        ("1.5 us", 1.5e-6),
        (" 16 ", 16),
        (16, 16),
        (8e9, 8e9),
        (1e16, 1e16),
        ("667e12", 667e12),
    ],
)
def test_quantities(text, number):
    assert quantity(text) == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "GB/s", "1 GBs", "-1 GB", "1 2 GB", "1.GB/s", None, "nan", "many", "1e999", "1e-3"]
)
def test_what_is_not_a_quantity_is_refused(text):
    with pytest.raises(ValueError, match="expected a number and one of the units"):
        quantity(text)
    with pytest.raises(ValidationError):
        Figure(value=text, source="x")
