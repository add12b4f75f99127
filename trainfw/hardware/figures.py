"""Figures with units and sources, as topology files write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, model_validator

from trainfw.config import Config, invalid

_UNITS = {
    "a plain number": {"": 1.0, "%": 0.01},
    "bytes": {"B": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    "bytes/s": {"GB/s": 1e9, "GiB/s": 2.0**30, "TB/s": 1e12, "Gbit/s": 1e9 / 8},
    "FLOP/s": {"TFLOP/s": 1e12, "PFLOP/s": 1e15},
    "seconds": {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    "dollars an hour": {"$/h": 1.0},
}
"""Units and their scales, by dimension."""
_SCALES = {unit: (dimension, scale) for dimension, units in _UNITS.items() for unit, scale in units.items()}
_QUANTITY = re.compile(r"\s*([0-9][0-9,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([A-Za-z/%$]*)\s*")


def units(of: str) -> str:
    """List the units of a dimension as ` (GB/s, GiB/s, ...)`; of a plain number, nothing."""
    return "" if "" in _UNITS[of] else f" ({', '.join(_UNITS[of])})"


def parsed(text: object) -> tuple[float, str]:
    """Parse `"96 GiB"`, `"2.9 TB/s"`, `"200 Gbit/s"` (as bytes/s), `"15 us"`, `"4 h"`, `"80 %"`, `"2.32 $/h"` or a
    plain number: (the quantity in SI base units and bytes, its dimension: `bytes`, `bytes/s`, `FLOP/s`, `seconds`,
    `dollars an hour`, `a plain number`).

    Raises ValueError for anything else.
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None or match[2] not in _SCALES:
        raise ValueError(f"{text!r}: expected a number and one of the units {', '.join(filter(None, _SCALES))}")
    of, scale = _SCALES[match[2]]
    return float(match[1].replace(",", "")) * scale, of


def duration(seconds: float) -> str:
    """Write `1.53 s`, `20 ms`, `6.25 us`: three digits."""
    if seconds == 0:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:,.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def in_seconds(seconds: float) -> str:
    """Write `281 s`, `17.5 s`, `0.83 s`, `6.25 ms`: at scales of a step."""
    if seconds >= 0.1:
        return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms"


def in_any_unit(seconds: float) -> str:
    """Write `66.0 d`, `24.7 h`, `3.6 min`, else as `in_seconds`: at scales of a run."""
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale * 1.5:
            return f"{seconds / scale:,.1f} {unit}"
    return in_seconds(seconds)


class Claim(Config):
    """Figure in the words of one document."""

    value: Any
    source: str

    @model_validator(mode="after")
    def _is_a_quantity(self) -> Claim:
        try:
            parsed(self.value)
        except ValueError as error:
            invalid("value", str(error))
        return self


class Figure(Claim):
    """A figure of the hardware with where it is from; where documents disagree, what the others say too."""

    also: list[Claim] = []
    """Claims of other documents."""
    note: str = ""
    """Note on what is derived, assumed or not confirmed."""

    @property
    def number(self) -> float:
        """Return the figure in SI base units and bytes."""
        return parsed(self.value)[0]

    @property
    def doubtful(self) -> bool:
        """Tell whether documents disagree about it, or it is derived or assumed."""
        return bool(self.also) or any(word in self.note for word in ("assumed", "derived", "may mean"))


def _of(expected: str) -> AfterValidator:
    def check(figure: Figure) -> Figure:
        if parsed(figure.value)[1] != expected:
            invalid("value", f"{figure.value!r}: expected {expected}{units(expected)}")
        return figure

    return AfterValidator(check)


def _is_a_share(figure: Figure) -> Figure:
    if not 0 < figure.number <= 1:
        invalid("value", f"{figure.value!r}: expected a share, more than 0 and at most 1")
    return figure


Size = Annotated[Figure, _of("bytes")]
Rate = Annotated[Figure, _of("bytes/s")]
Flops = Annotated[Figure, _of("FLOP/s")]
Seconds = Annotated[Figure, _of("seconds")]
Price = Annotated[Figure, _of("dollars an hour")]
Number = Annotated[Figure, _of("a plain number")]
Share = Annotated[Number, AfterValidator(_is_a_share)]
