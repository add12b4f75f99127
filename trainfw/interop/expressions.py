"""Regular expressions from foreign files, matched without backtracking.

Python's own parser reads them. Its tree is walked with the set of all places in the text that are reached so far, as
the bits of one number. So the time depends on the lengths of both, and not on the number of ways to match.
"""

from __future__ import annotations

import functools
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from trainfw.errors import UserError, short

MAX_EXPRESSION, MAX_TEXT = 4_000, 500
"""Most characters of an expression, and of a name to match: the longest in use have some hundreds."""
MAX_STEPS = 1_000_000
"""Most letters parsed and parts of expressions matched for one file: a few seconds."""


class Steps:
    """Budget of steps for matching the expressions of one file."""

    def __init__(self, file: str, left: int = MAX_STEPS):
        self._file, self._left = file, left

    def spend(self, count: int = 1) -> None:
        """Take steps off the budget. Raises UserError where it is used up."""
        self._left -= count
        if self._left < 0:
            raise UserError(
                f"{self._file}: its regular expressions take too long to match; simplify them, or list the names"
            )


class Text:
    """A text to match. Place i is before character i; a set of places is a number, with a bit for each place."""

    def __init__(self, text: str, steps: Steps):
        self.text, self.steps = text, steps
        self.letters: dict[str, int] = {}
        for place, letter in enumerate(text):
            self.letters[letter] = self.letters.get(letter, 0) | 1 << place
        self._places: dict[re.Pattern[str], int] = {}
        steps.spend(1 + len(text))

    def where(self, pattern: re.Pattern[str], width: int) -> int:
        """Return the places at which a pattern of one letter, or of none, matches."""
        if pattern not in self._places:
            self.steps.spend(1 + len(self.letters))
            letters = (places for letter, places in self.letters.items() if pattern.match(letter))
            anchors = (1 << found.start() for found in pattern.finditer(self.text))
            self._places[pattern] = _union(letters if width else anchors)
        return self._places[pattern]


_Match = Callable[[Text, int], int]
"""Function from the places where a part begins to those where it may end."""


class Expression:
    """A regular expression in Python's syntax, without flags and without parts that need backtracking (references to
    groups, conditions, atomic groups, possessive repeats).

    Args:
        where: the place where it is written; errors begin with it.
        steps: the budget of the file.

    Raises UserError where it is no such expression.
    """

    def __init__(self, pattern: str, where: str, steps: Steps):
        self._name = f"{where}: {short(pattern)}"
        if len(pattern) > MAX_EXPRESSION:
            raise UserError(f"{self._name}: has {len(pattern):,} characters; expected {MAX_EXPRESSION:,} at most")
        steps.spend(len(pattern))
        try:
            with warnings.catch_warnings(action="ignore"):  # about syntax that a later Python may read otherwise
                parsed = parser.parse(pattern)
            if parsed.state.flags & ~re.UNICODE:
                raise self._refusal("flags")
            self._state = parsed.state
            self._match = self._sequence(parsed)
            # Most expressions are plain names: these match in one way only, and `re` is faster.
            plain = all(code in (codes.LITERAL, codes.ANY) for code, _ in parsed)
            self._plain, self._length = re.compile(pattern) if plain else None, len(parsed)
        except (re.error, OverflowError) as error:
            raise self._invalid(str(error)) from None
        except RecursionError:
            raise self._invalid("nested too deeply") from None

    def matches(self, text: Text, starts: int = 1) -> bool:
        """Tell whether it matches a text from one of these places (by default the first) to the end.

        Raises UserError where the expressions of a file take too long.
        """
        if self._plain is not None:
            text.steps.spend()
            start = len(text.text) - self._length
            return start >= 0 and bool(starts >> start & 1) and self._plain.fullmatch(text.text, start) is not None
        try:
            return bool(self._match(text, starts) >> len(text.text) & 1)
        except RecursionError:
            raise self._invalid("nested too deeply") from None

    def _invalid(self, why: str) -> UserError:
        return UserError(f"{self._name} is not a regular expression: {why}")

    def _refusal(self, syntax: str) -> UserError:
        return UserError(f"{self._name}: {syntax} are not supported in a regular expression; list the names instead")

    def _sequence(self, parsed: Any) -> _Match:
        parts = [self._part(*each) for each in parsed]

        def match(text: Text, places: int) -> int:
            text.steps.spend()  # also for an empty sequence: a branch may have thousands
            for part in parts:
                if not places:
                    break
                text.steps.spend()
                places = part(text, places)
            return places

        return match

    def _part(self, code: Any, value: Any) -> _Match:
        if code is codes.LITERAL:
            letter = chr(value)
            return lambda text, places: (places & text.letters.get(letter, 0)) << 1
        if code in _ONE_LETTER or code in (codes.AT, codes.FAILURE):
            pattern, width = self._compiled(code, value), code in _ONE_LETTER
            return lambda text, places: (places & text.where(pattern, width)) << width
        if code is codes.BRANCH:
            choices = [self._sequence(choice) for choice in value[1]]
            return lambda text, places: _union(choice(text, places) for choice in choices)
        if code is codes.SUBPATTERN and not (value[1] or value[2]):
            return self._sequence(value[3])
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            return self._repeat(*value)
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            return self._around(*value, wanted=code is codes.ASSERT)
        raise self._refusal(_REFUSED.get(code, str(code).lower()))

    def _compiled(self, code: Any, value: Any) -> re.Pattern[str]:
        return compiler.compile(parser.SubPattern(self._state, [(code, value)]))

    def _repeat(self, least: int, most: int, parsed: Any) -> _Match:
        once = self._sequence(parsed)
        if most == codes.MAXREPEAT and len(parsed) == 1 and parsed[0][0] in _ONE_LETTER:
            letters = self._compiled(*parsed[0])

            def rest(text: Text, places: int) -> int:
                """Match in one step: the sum carries from each place to the end of its run of letters."""
                run = text.where(letters, 1)
                return ((places & run) + run) ^ run | places
        else:

            def rest(text: Text, places: int) -> int:
                new, left = places, most - least
                while new and left:
                    new = once(text, new) & ~places
                    places, left = places | new, left - 1
                return places

        def match(text: Text, places: int) -> int:
            # After so many repeats one was empty, and can be repeated for ever: further ones change nothing.
            for _ in range(min(least, len(text.text) + 1)):
                places = once(text, places)
                if not places:
                    break
            return rest(text, places)

        return match

    def _around(self, direction: int, parsed: Any, *, wanted: bool) -> _Match:
        """Return the match of a look-ahead or look-behind, which tests each place by itself."""
        inner, (width, most) = self._sequence(parsed), parsed.getwidth()
        if direction < 0 and width != most:
            raise self._invalid("look-behind requires fixed-width pattern")

        def holds(text: Text, place: int) -> bool:
            if direction > 0:
                return bool(inner(text, 1 << place))
            return place >= width and bool(inner(text, 1 << place - width) >> place & 1)

        def match(text: Text, places: int) -> int:
            each = (place for place in range(places.bit_length()) if places >> place & 1)
            return _union(1 << place for place in each if holds(text, place) is wanted)

        return match


_ONE_LETTER = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN}
_REFUSED = {
    codes.GROUPREF: "references to groups",
    codes.GROUPREF_EXISTS: "conditions",
    codes.ATOMIC_GROUP: "atomic groups",
    codes.POSSESSIVE_REPEAT: "possessive repeats",
    codes.SUBPATTERN: "flags",
}


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)
