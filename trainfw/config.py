"""The base of every package's `Config`: strict, frozen, unknown keys refused, docstrings in the schema."""

from __future__ import annotations

from typing import Annotated, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

INT32 = 2**31 - 1
"""The largest integer that arrays index with: the upper bound of sizes and counts."""

FLOAT32 = (2.0**-126, (2 - 2**-23) * 2.0**127)
"""The least and the largest number that programs hold at full precision."""

PositiveInt = Annotated[int, Field(gt=0, le=INT32)]


def _in_float32(value: float) -> float:
    if not FLOAT32[0] <= value <= FLOAT32[1]:
        raise PydanticCustomError("float32", "Input should be a number that float32 holds: 1.2e-38 to 3.4e+38")
    return value


PositiveFloat32 = Annotated[float, Field(gt=0), AfterValidator(_in_float32)]


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


def invalid(field: str, message: str) -> NoReturn:
    """Refuse a combination of values from inside a validator, blaming `field` (so its line is shown)."""
    # The message is passed as data because PydanticCustomError formats braces in its template.
    raise PydanticCustomError("combination", "{message}", {"field": field, "message": message})
