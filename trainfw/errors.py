"""User-facing errors and the "did you mean" that goes with them."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

TRY_AGAIN = 75
"""Exit code of a command that failed for no fault of its input: given again, it goes on (EX_TEMPFAIL, sysexits.h)."""


class UserError(ValueError):
    """Bad input: a recipe, an argument or a file the user can fix. The CLI exits 2, with no traceback."""

    field = ""
    """Field to blame, of the section of a recipe that the raising code was given; see `about`."""
    placed = False
    """It says already which key is to blame, and where that was written."""


class RunError(RuntimeError):
    """A run that was well described failed while running. The CLI exits 1, with no traceback."""


class PeerError(RunError):
    """Another process of the run died or hangs. The CLI exits with `TRY_AGAIN`."""


def one_of(name: str, choices: Collection[str]) -> str:
    """List the choices, for a name that a file gives: nobody has mistyped it, so that a near one is another thing.

    `"; did you mean 'x'?"` only where it is `x` in other letters' case and marks.
    """
    plain = {choice: "".join(filter(str.isalnum, choice.lower())) for choice in (*choices, name)}
    same = [choice for choice in choices if plain[choice] == plain[name]]
    return f"; did you mean {same[0]!r}?" if same else f"; one of: {', '.join(choices)}"


def short(value: object, limit: int = 80) -> str:
    """Show the repr of a value that a file gives, cut where it is long: no control characters, and no pages of it."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def expect(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise UserError, which names an argument of a call and shows its value, unless what is expected of it holds."""
    if not holds:
        raise UserError(f"{name} = {short(value)}: expected {expected}")


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Blame `field` of a section for a UserError inside, unless it names one itself (`Recipe.blamed` reads it)."""
    try:
        yield
    except UserError as error:
        error.field = error.field or field
        raise


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Suggest `"; did you mean 'x'?"` for the nearest of `choices`, or the short list of choices, or nothing."""
    choices = list(choices)
    close = nearest(word, choices)
    if close is not None:
        return f"; did you mean {close!r}?"
    if 0 < len(choices) <= 12:
        return f"; one of: {', '.join(choices)}"
    return ""


def nearest(word: str, choices: Iterable[str], likeness: float = 0.6) -> str | None:
    """Find the choice most like `word`, whatever its case, hyphens and underscores; None where none is so like it.

    Args:
        likeness: the share of letters that both have in order (difflib's ratio), at least.
    """
    plain: dict[str, str] = {}
    for choice in choices:
        plain.setdefault(_plain(choice), choice)
    close = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=likeness)
    return plain[close[0]] if close else None


def _plain(word: str) -> str:
    return re.sub(r"[-_ ]", "", word.lower())


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def pip_install(extra: str) -> str:
    """Write the command that installs what an optional part of trainfw needs, from wherever trainfw was installed.

    It names the packages: trainfw is in no registry, so `trainfw[datasets]` would be looked for in vain.
    """
    import importlib.metadata  # takes as long as all else that `--help` imports

    try:
        requirements = [line.partition(";") for line in importlib.metadata.requires("trainfw") or ()]
    except importlib.metadata.PackageNotFoundError:  # a clone, put on the path
        requirements = []
    marker_of = f"extra == '{extra}'"
    named = [f'"{name.strip()}"' for name, _, marker in requirements if marker_of in marker.replace('"', "'")]
    return f"pip install {' '.join(named) or repr(f'{Path(__file__).parents[1]}[{extra}]')}"
