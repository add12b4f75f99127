"""Pieces of a run that are somebody's own: found by `package.module:Name`, and named so where a script has them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from trainfw.errors import RunError, UserError

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*")


def is_own(name: str) -> bool:
    """Tell whether a name has the form `package.module:Name`."""
    return _OWN.fullmatch(name) is not None


def load_piece(name: str, key: str = "name") -> Any:
    """Return what `package.module:Name` names. Raises UserError, which begins with `key`, where there is none."""
    module, _, path = name.partition(":")
    try:
        with blaming(f"{key} = {name!r}: cannot be made", but=(ImportError, AttributeError)):
            return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{key} = {name!r}: cannot be made: {error}; expected a module on Python's path, or the piece itself from "
            "the script that has it"
        ) from error


@contextlib.contextmanager
def blaming(said: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise UserError, which begins with `said`, for what somebody's own code raises inside: sys.exit(), too."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (UserError, RunError, *but)):
            raise
        raise UserError(f"{said}: {type(error).__name__}: {error}") from error


def make_piece(
    name: str,
    options: Mapping[str, Any],
    *arguments: Any,
    key: str = "name",
    methods: Sequence[str] = (),
    expected: str = "",
) -> Any:
    """Return what `package.module:Name` makes of arguments and options. Raises UserError where it makes nothing.

    With `methods`, it is a class that has these: a stranger's recipe is not to call any function with its options.
    """
    piece = load_piece(name, key)
    if methods and not isinstance(piece, type):
        raise UserError(f"{key} = {name!r}: is a {type(piece).__name__}; expected a class, a {expected}")
    check_parts(piece, key, name, methods, expected)
    try:
        with blaming(f"{key} = {name!r}: cannot be made", but=(TypeError,)):
            return piece(*arguments, **options)
    except TypeError as error:
        raise UserError(f"{key} = {name!r}: cannot be made: {error}") from error


def check_parts(made: Any, key: str, name: str, parts: Sequence[str], expected: str) -> Any:
    """Return a piece that was made. Raises UserError, which begins with `key`, where it lacks one of `parts`."""
    if lacking := [part for part in parts if not hasattr(made, part)]:
        raise UserError(f"{key} = {name!r}: has no {' and no '.join(lacking)}; expected a {expected}")
    return made


@contextlib.contextmanager
def running(key: str, name: str, part: str) -> Iterator[None]:
    """While a part of somebody's own piece runs inside: what it raises is a UserError, which begins with `key`.

    It names the last line of the piece's own code, or of what that called, outside of trainfw and installed packages.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        ours = (str(Path(__file__).parent), "site-packages", "dist-packages", "<frozen")
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not any(part in frame.filename for part in ours)]
        at = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{key} = {name!r}: its {part} raises {type(error).__name__}: {said}{at}") from error


def name_of(piece: Any) -> str:
    """Return `package.module:Name` of a function or a class, or of an object's class."""
    if isinstance(piece, functools.partial):
        return name_of(piece.func)
    # A generator has a __qualname__ and no module.
    kind = piece if hasattr(piece, "__qualname__") and hasattr(piece, "__module__") else type(piece)
    module = kind.__module__
    return f"{_main() if module == '__main__' else module}:{kind.__qualname__}"


def options_of(piece: Any) -> dict[str, Any]:
    """Return the values that a piece was made with, as a recipe can hold them: of others, the names of their kinds."""
    if isinstance(piece, functools.partial):
        given = {f"argument {n}": value for n, value in enumerate(piece.args)} | piece.keywords
    elif inspect.isfunction(piece):
        given = dict(inspect.getclosurevars(piece).nonlocals)
    elif is_dataclass(piece) and not isinstance(piece, type):
        given = {field.name: getattr(piece, field.name) for field in fields(piece)}
    else:
        given = {} if isinstance(piece, type) else dict(getattr(piece, "__dict__", {}))
    return {name: _plain(value) for name, value in given.items() if not name.startswith("_")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return name_of(value)


def _main() -> str:
    """Return the name by which the script that runs can be imported from its own directory."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return str(spec.name).removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    return re.sub(r"\W", "_", Path(file).stem) if file else "__main__"
