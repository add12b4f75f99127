"""Metadata of a checkpoint beside its arrays: JSON whose types are checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

META_FILE = "meta/metadata"


class Damage(Exception):
    """Reason, in words, why a checkpoint is not trusted."""


class _Checked(BaseModel):
    # Keys of other versions pass: the format (`identity.FORMAT`) tells which versions can read a checkpoint.
    model_config = ConfigDict(strict=True, extra="allow")


class _Place(_Checked):
    next_row: int = Field(ge=0)
    order: str


class _Weights(_Checked):
    path: str
    hash: str


class _Meta(_Checked):
    """`data` is the place in the rows, `base` the weights that the run began with, `cut` the parts of a batch."""

    data: _Place | None = None
    held_out: str | None = None
    recipe: dict[str, Any] | None = None
    base: _Weights | None = None
    cut: dict[str, int | None] = Field(default_factory=dict)
    guard: dict[str, float | list[float]] = Field(default_factory=dict)
    layer_order: list[int] | None = None


def parse_meta(content: bytes, *, of_run: bool = False) -> dict[str, Any]:
    """Parse a checkpoint's metadata. Raises Damage where it does not have the right types.

    Args:
        of_run: require the recipe and the place in the data, which a run needs to go on.
    """
    try:
        meta = json.loads(content)
        _Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise Damage(f"{META_FILE}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    except (ValueError, RecursionError):
        raise Damage(f"{META_FILE} is no JSON") from None
    order = meta.get("layer_order")
    if order is not None and sorted(order) != list(range(len(order))):
        raise Damage(f"{META_FILE}: layer_order: expected each layer once")
    for key in ("recipe", "data") if of_run else ():
        if meta.get(key) is None:
            raise Damage(f"{META_FILE} has no {key}")
    return dict(meta)


def digest_recipe(meta: Mapping[str, object]) -> str | None:
    """Return the SHA-256 of the recipe in `meta`, in whatever order its keys are; None where there is none."""
    recipe = json.loads(json.dumps(meta.get("recipe")))
    return None if recipe is None else hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
