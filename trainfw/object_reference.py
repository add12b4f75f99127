"""Somebody's own code, named in a recipe as `package.module:Name`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from trainfw.errors import UserError

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_reference(name: str) -> bool:
    """Tell whether a name has the form `package.module:Name`."""
    return _REFERENCE.fullmatch(name) is not None


def make_object(key: str, reference: str, parts: Sequence[str], expected: str, **options: Any) -> Any:
    """Import what `reference` names, and return what it makes when it is called with `options`.

    Raises UserError, about `key`, where that cannot be done, or where the object lacks one of `parts`.
    """
    module, _, name = reference.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"{key} = {reference!r}: cannot be made: {error}") from error
    if lacking := [part for part in parts if not hasattr(made, part)]:
        raise UserError(f"{key} = {reference!r}: has no {' and no '.join(lacking)}; expected a {expected}")
    return made
