"""Figures with units and sources, as topology files write them."""

from __future__ import annotations

import re
from typing import Any

from pydantic import model_validator

from trainfw.config import Config, invalid

_UNITS = {
    "": 1.0,
    "B": 1.0,
    "MB": 1e6,
    "GB": 1e9,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TB": 1e12,
    "TiB": 2.0**40,
    "GB/s": 1e9,
    "GiB/s": 2.0**30,
    "TB/s": 1e12,
    "Gbit/s": 1e9 / 8,
    "TFLOP/s": 1e12,
    "PFLOP/s": 1e15,
    "us": 1e-6,
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
}
_QUANTITY = re.compile(r"\s*([0-9][0-9,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([A-Za-z/]*)\s*")


def quantity(text: Any) -> float:
    """`"96 GiB"`, `"2.9 TB/s"`, `"200 Gbit/s"` (as bytes/s), `"15 us"`, `"4 h"` or a plain number,
    in SI base units and bytes.

    Raises ValueError for anything else.
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r}: expected a number and one of the units {', '.join(u for u in _UNITS if u)}")
    return float(match[1].replace(",", "")) * _UNITS[match[2]]


def duration(seconds: float) -> str:
    """`1.53 s`, `20 ms`, `6.25 us`: three digits."""
    if seconds == 0:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:,.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


class Claim(Config):
    """What one document says."""

    value: Any
    source: str

    @model_validator(mode="after")
    def _is_a_quantity(self) -> Claim:
        _checked(self.value)
        return self


class Figure(Claim):
    """A figure of the hardware with where it is from; where documents disagree, what the others say too."""

    also: list[Claim] = []
    """What other documents say."""
    note: str = ""
    """What is derived, assumed or not confirmed about it."""

    @property
    def number(self) -> float:
        """In SI base units and bytes."""
        return quantity(self.value)

    @property
    def doubtful(self) -> bool:
        """Whether documents disagree about it, or it is derived or assumed."""
        return bool(self.also) or any(word in self.note for word in ("assumed", "derived", "may mean"))


def _checked(value: Any) -> None:
    try:
        quantity(value)
    except ValueError as error:
        invalid("value", str(error))
