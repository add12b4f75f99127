"""Regular expressions from foreign files, matched without backtracking.

Python's own parser reads them. Its tree is walked with the set of all places in the text that are reached so far, as
the bits of one number. So the time depends on the lengths of both, and not on the number of ways to match.
"""

from __future__ import annotations

import functools
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
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
        self._places: dict[Any, int] = {}
        steps.spend(1 + len(text))

    def before(self, letters: _Letters) -> int:
        """Return the places before one of these letters."""
        if letters not in self._places:
            self.steps.spend(letters.cost * len(self.letters))
            self._places[letters] = _union(places for letter, places in self.letters.items() if letters.holds(letter))
        return self._places[letters]

    def where(self, holds: Callable[[str, int], bool]) -> int:
        """Return the places for which a test is true."""
        if holds not in self._places:
            self.steps.spend(len(self.text) + 1)
            self._places[holds] = _union(1 << place for place in range(len(self.text) + 1) if holds(self.text, place))
        return self._places[holds]


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
        if code in _ONE_LETTER:
            letters = _letters(code, value)
            return lambda text, places: (places & text.before(letters)) << 1
        if code is codes.AT and value in _PLACES:
            holds = _PLACES[value]
            return lambda text, places: places & text.where(holds)
        if code is codes.BRANCH:
            choices = [self._sequence(choice) for choice in value[1]]
            return lambda text, places: _union(choice(text, places) for choice in choices)
        if code is codes.SUBPATTERN and not (value[1] or value[2]):
            return self._sequence(value[3])
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            return self._repeat(*value)
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            return self._around(*value, wanted=code is codes.ASSERT)
        if code is codes.FAILURE:
            return lambda text, places: 0
        raise self._refusal(_REFUSED.get(code, str(code).lower()))

    def _repeat(self, least: int, most: int, parsed: Any) -> _Match:
        once = self._sequence(parsed)
        if most == codes.MAXREPEAT and len(parsed) == 1 and parsed[0][0] in _ONE_LETTER:
            letters = _letters(*parsed[0])

            def rest(text: Text, places: int) -> int:
                """Match in one step: the sum carries from each place to the end of its run of letters."""
                run = text.before(letters)
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

        return lambda text, places: _union(1 << place for place in _each(places) if holds(text, place) is wanted)


class _Letters:
    """A set of letters: one, all but one, or those in brackets."""

    def __init__(self, items: tuple[tuple[object, object], ...]):
        self._negated = items[0][0] is codes.NEGATE
        self._tests = [_LETTERS[code](value) for code, value in items[self._negated :]]
        self.cost = len(items)

    def holds(self, letter: str) -> bool:
        return any(test(letter) for test in self._tests) is not self._negated


@functools.lru_cache(256)
def _shared(items: tuple[tuple[object, object], ...]) -> _Letters:
    return _Letters(items)


def _letters(code: Any, value: Any) -> _Letters:
    return _shared(tuple(value) if code is codes.IN else ((code, value),))


def _is(value: int) -> Callable[[str], bool]:
    return lambda letter: ord(letter) == value


def _in_range(bounds: tuple[int, int]) -> Callable[[str], bool]:
    return lambda letter: bounds[0] <= ord(letter) <= bounds[1]


def _word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _boundary(text: str, place: int) -> bool:
    return (place > 0 and _word(text[place - 1])) is not (place < len(text) and _word(text[place]))


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: _word,
    codes.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    codes.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    codes.CATEGORY_NOT_WORD: lambda letter: not _word(letter),
}
_LETTERS: dict[Any, Callable[[Any], Callable[[str], bool]]] = {
    codes.LITERAL: _is,
    codes.NOT_LITERAL: lambda value: lambda letter: ord(letter) != value,
    codes.ANY: lambda _: lambda letter: letter != "\n",
    codes.RANGE: _in_range,
    codes.CATEGORY: lambda value: _CATEGORIES[value],
}
_ONE_LETTER = {*_LETTERS, codes.IN}
_PLACES: dict[Any, Callable[[str, int], bool]] = {
    codes.AT_BEGINNING: lambda text, place: place == 0,
    codes.AT_BEGINNING_STRING: lambda text, place: place == 0,
    codes.AT_END: lambda text, place: text[place:] in ("", "\n"),
    codes.AT_END_STRING: lambda text, place: place == len(text),
    codes.AT_BOUNDARY: _boundary,
    codes.AT_NON_BOUNDARY: lambda text, place: bool(text) and not _boundary(text, place),
}
_REFUSED = {
    codes.GROUPREF: "references to groups",
    codes.GROUPREF_EXISTS: "conditions",
    codes.ATOMIC_GROUP: "atomic groups",
    codes.POSSESSIVE_REPEAT: "possessive repeats",
    codes.SUBPATTERN: "flags",
}


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _each(places: int) -> Iterator[int]:
    """Yield the places in a set."""
    while places:
        yield (places & -places).bit_length() - 1
        places &= places - 1
