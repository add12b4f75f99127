"""The base of every package's `Config`: strict, frozen, unknown keys refused, docstrings in the schema."""

from __future__ import annotations

import re
from typing import Annotated, NoReturn

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

INT32 = 2**31 - 1
"""The largest integer that arrays index with: the upper bound of counts."""
LARGEST_DIM = 2**24
"""The largest dim of an array that a recipe can mean: 60 of the largest vocabularies, 16 contexts of a million."""
_LARGEST_INT = 2**32
SMALLEST, LARGEST = 1e-30, 1e30
"""Limits of floats other than zero: what arrays of float32 hold, and what is computed of them."""

PositiveInt = Annotated[int, Field(gt=0, le=INT32)]
Dim = Annotated[int, Field(gt=0, le=LARGEST_DIM)]

_NOT_IN_NAMES = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Controls, line breaks of any kind, and halves of characters, as which Python shows bytes that are no UTF-8."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Bytes: NAME_MAX and PATH_MAX of Linux."""


def name_problem(text: str) -> str | None:
    """Say why `text` can be no name, pattern or path: no file system or script takes its characters or length."""
    if found := _NOT_IN_NAMES.search(text):
        return f"holds the character U+{ord(found[0]):04X}, which no name or path may have"
    if max(len(part.encode()) for part in text.split("/")) > _LONGEST_NAME or len(text.encode()) > _LONGEST_PATH:
        return f"is longer than file systems take: {_LONGEST_NAME} bytes a name, {_LONGEST_PATH} a path"
    return None


class Config(BaseModel):
    """A section of a recipe. A field's docstring is its description in `trainfw recipe schema`."""

    # Strict, because a quoted "50" or a `true` where a number belongs is a mistake that should show here.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # `from`, which Python does not take as a name
    )

    @field_validator("*")
    @classmethod
    def _can_be_meant(cls, value: object) -> object:
        if isinstance(value, int) and abs(value) > _LARGEST_INT:
            invalid("", f"expected at most {_LARGEST_INT:,}, not a number of {len(str(abs(value)))} digits")
        if isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
            invalid("", f"{value:g}: expected 0, or a number between {SMALLEST:g} and {LARGEST:g}")
        return value


def invalid(field: str, message: str) -> NoReturn:
    """Refuse a combination of values from inside a validator, blaming `field` (so its line is shown)."""
    # The message is passed as data because PydanticCustomError formats braces in its template.
    raise PydanticCustomError("combination", "{message}", {"field": field, "message": message})
