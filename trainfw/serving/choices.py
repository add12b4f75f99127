"""Answers of one request, read from the engine's thread without waiting in one's own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from trainfw.data import Tokenizer
from trainfw.serving.bodies import ApiError, Json
from trainfw.serving.grammar import Matcher
from trainfw.serving.metrics import Metrics
from trainfw.serving.requests import Answer
from trainfw.serving.text import AnswerText, Shown, ToolCalls


@dataclass
class Piece:
    """A part of an answer, as far as it can be given."""

    text: str
    tokens: list[Shown]
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    """Reason why the answer ended, in OpenAI's words, with its last piece."""


class Choice:
    """One answer of a request."""

    def __init__(
        self,
        index: int,
        answer: Answer,
        text: AnswerText,
        began: float,
        *,
        calls: ToolCalls | None = None,
        constraint: Matcher | None = None,
    ):
        self.index, self.answer, self.text = index, answer, text
        self.ended = False
        self._calls, self._constraint = calls, constraint
        self._began, self._first, self._last = began, 0.0, 0.0

    def read(self) -> Piece | None:
        """Return what has come since the last call; None where nothing that could be given has.

        Raises ApiError where the engine gave the answer up.
        """
        finish = None
        while not self.text.ended:
            try:
                drawn = self.answer.next(0)
            except TimeoutError:
                break
            if drawn is None:
                finish = self.answer.finish_reason
                self.text.end()
                break
            self._last = time.monotonic()
            self._first = self._first or self._last
            self.text.push(drawn)
        if self.text.ended:
            self.ended = True
            self.answer.cancel()  # nothing, where it has ended by itself
            self._check(finish)
        text, tokens = self.text.take()
        piece = Piece(text, tokens)
        if self._calls is not None:
            piece.text = self._calls.push(text)
        if self.ended:
            piece.finish = "length" if finish == "length" else "stop"
            if self._calls is not None:
                rest, piece.calls = self._calls.end()
                piece.text += rest
                piece.finish = "tool_calls" if piece.calls else piece.finish
        return piece if self.ended or piece.text or tokens else None

    def _check(self, finish: str | None) -> None:
        if finish == "error":
            raise ApiError(500, self.answer.error or "the engine has failed")
        if finish == "cancelled":
            raise ApiError(503, "the server is stopping; the answer is not complete")
        if self._constraint is not None and self._constraint.problem is not None:
            raise ApiError(500, f"response_format: {self._constraint.problem[:200]}")

    def measure(self, metrics: Metrics, finish: str) -> None:
        metrics.answers.labels(finish).inc()
        if self._first:
            metrics.first_token.observe(self._first - self._began)
        if self.text.count > 1:
            metrics.each_token.observe((self._last - self._first) / (self.text.count - 1))


class Choices:
    """The answers of a request, which end with it: whoever leaves the `with` block frees their slots."""

    def __init__(self, metrics: Metrics):
        self.all: list[Choice] = []
        self.prompt_tokens = 0
        self.began = time.monotonic()
        self._metrics, self._finished = metrics, set[int]()

    def __enter__(self) -> Choices:
        return self

    def __exit__(self, *_: object) -> None:
        for choice in self.all:
            choice.answer.cancel()
            if choice.index not in self._finished:
                choice.measure(self._metrics, "cancelled")

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Wait for what comes, to the end of all. Raises ApiError where the engine gave one up."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
                loop.call_soon_threadsafe(changed.set)

        for choice in self.all:
            choice.answer.on_change(tell)
        while len(self._finished) < len(self.all):
            await changed.wait()
            changed.clear()
            for choice in self.all:
                if not choice.ended and (piece := choice.read()) is not None:
                    if piece.finish is not None:
                        self._finished.add(choice.index)
                        choice.measure(self._metrics, piece.finish)
                    yield choice, piece

    def usage(self) -> Json:
        drawn = sum(choice.text.count for choice in self.all)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
        }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Shown]) -> Json:
    """Return the tokens of a piece and their likeliest others, as a chat completion has them."""

    def one(token: int, logprob: float | None) -> Json:
        return {
            "token": token_text(tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": [*tokenizer.token_bytes(token)],
        }

    return {
        "content": [
            one(shown.drawn.token, shown.drawn.logprob)
            | {"top_logprobs": [one(token, logprob) for token, logprob in shown.drawn.likeliest]}
            for shown in tokens
        ],
        "refusal": None,
    }


def text_logprobs(tokenizer: Tokenizer, tokens: Sequence[Shown]) -> Json:
    """Return the tokens of a piece and their likeliest others, as a completion has them."""
    return {
        "tokens": [token_text(tokenizer, shown.drawn.token) for shown in tokens],
        "token_logprobs": [_finite(shown.drawn.logprob) for shown in tokens],
        "top_logprobs": [
            {token_text(tokenizer, token): _finite(logprob) for token, logprob in shown.drawn.likeliest}
            for shown in tokens
        ],
        "text_offset": [shown.start for shown in tokens],
    }


def _finite(logprob: float | None) -> float | None:
    """Return a logarithm that JSON can write: -9999 stands for what is never drawn, as OpenAI has it."""
    return None if logprob is None else max(logprob, -9999.0)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; of bytes that are no whole character, `bytes:\\xe2\\x80`, as OpenAI writes them."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
