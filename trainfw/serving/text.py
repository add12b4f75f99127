"""Texts of answers from their tokens: whole characters, nothing of a stop string, calls of tools apart."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from trainfw.data import TextStream, Tokenizer
from trainfw.serving.requests import Drawn

TOOL_CALL = "<tool_call>"
_TOOL_CALL_END = "</tool_call>"


def held(text: str, marks: Sequence[str]) -> int:
    """Count the characters at the end of `text` that one of `marks` may begin with."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


@dataclass(frozen=True)
class Shown:
    """A token whose text was given, and the place in the answer's text at which it begins."""

    drawn: Drawn
    start: int


class AnswerText:
    """Text of one answer, taken piece by piece while its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        """`stops`: strings before which the text ends."""
        self._stream, self._stops = TextStream(tokenizer), stops
        self._pending, self._given = "", 0
        self._tokens: deque[Shown] = deque()
        self.count = 0
        """Tokens that have come."""
        self.ended = False
        """Nothing more is to come: after `end`, or a stop string."""

    def push(self, drawn: Drawn) -> None:
        """Add a token. Those after the end are left out."""
        if self.ended:
            return
        self.count += 1
        self._tokens.append(Shown(drawn, self._given + len(self._pending)))
        self._add(self._stream.push(drawn.token))

    def end(self) -> None:
        """Take note that no more tokens come: bytes that make no whole character become U+FFFD."""
        if not self.ended:
            self._add(self._stream.flush())
            self.ended = True

    def _add(self, text: str) -> None:
        self._pending += text
        found = [place for stop in self._stops if (place := self._pending.find(stop)) >= 0]
        if text and found:
            self._pending, self.ended = self._pending[: min(found)], True
            end = self._given + len(self._pending)
            self._tokens = deque(token for token in self._tokens if token.start < end)

    def take(self) -> tuple[str, list[Shown]]:
        """Return the text since the last call that no stop string can take back, and its tokens."""
        size = len(self._pending) - (0 if self.ended else held(self._pending, self._stops))
        text, self._pending = self._pending[:size], self._pending[size:]
        self._given += size
        tokens = []
        while self._tokens and (self.ended or self._tokens[0].start < self._given):
            tokens.append(self._tokens.popleft())
        return text, tokens


class ToolCalls:
    """Calls of tools in a text, in the form of Hermes and Qwen: JSON between `<tool_call>` and `</tool_call>`."""

    def __init__(self) -> None:
        self._pending = ""
        self._inside = False

    def push(self, text: str) -> str:
        """Add text and return what is no part of a call; from the first call on, nothing."""
        self._pending += text
        if self._inside:
            return ""
        if (place := self._pending.find(TOOL_CALL)) >= 0:
            self._inside = True
        else:
            place = len(self._pending) - held(self._pending, [TOOL_CALL])
        content, self._pending = self._pending[:place], self._pending[place:]
        return content

    def end(self) -> tuple[str, list[tuple[str, str]]]:
        """Return the rest of the text, and the calls as (name, arguments in JSON); no calls where one is malformed."""
        calls: list[tuple[str, str]] = []
        rest = self._pending
        while (rest := rest.lstrip()).startswith(TOOL_CALL):
            body, end, rest = rest.removeprefix(TOOL_CALL).partition(_TOOL_CALL_END)
            try:
                value = json.loads(body)
            except (ValueError, RecursionError):
                return self._pending, []
            for call in value if isinstance(value, list) else [value]:
                if not end or not isinstance(call, dict) or not isinstance(call.get("name"), str):
                    return self._pending, []
                if not isinstance(arguments := call.get("arguments", {}), dict):
                    return self._pending, []
                calls.append((call["name"], json.dumps(arguments, ensure_ascii=False)))
        return (rest, calls) if calls else (self._pending, [])
