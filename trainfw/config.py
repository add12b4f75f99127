"""The base of every package's `Config`: strict, frozen, unknown keys refused, docstrings in the schema."""

from __future__ import annotations

from typing import NoReturn

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """A section of a recipe. A field's docstring is its description in `trainfw recipe schema`."""

    # Strict, because a quoted "50" or a `true` where a number belongs is a mistake that should show here.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def invalid(field: str, message: str) -> NoReturn:
    """Refuse a combination of values from inside a validator, blaming `field` (so its line is shown)."""
    # The message is passed as data because PydanticCustomError formats braces in its template.
    raise PydanticCustomError("combination", "{message}", {"field": field, "message": message})
