"""Requests to an engine and their answers, token by token; the engine itself is in `engine`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np

from trainfw.errors import UserError, expect, short
from trainfw.sampling import ALTERNATIVES

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """The tokens that an answer may be made of, step by step; used from the engine's thread only."""

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next, u32[ceil(vocabulary / 32)]: bit i % 32 of word i // 32 is token i's."""

    def accept(self, token: int) -> None:
        """Take note of the token that came."""

    @property
    def ended(self) -> bool:
        """Tell whether nothing more may follow."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """None: another one for each request."""
    logprobs: int | None = None
    """None: none; n: the drawn token's and those of the n likeliest, 0 to 8."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens of which each ends the answer, and is no part of it."""
    adapter: str | None = None
    """Name of a loaded adapter; None: the model itself."""
    constraint: Constraint | None = None


def check_request(prompt: Sequence[int], sampling: Sampling, vocabulary: int, length: int) -> None:
    """Raise UserError for a request that makes no sense, or that a slot of `length` tokens has no room for."""
    expect("prompt", list(prompt), bool(prompt), "at least one token")
    if others := [token for token in prompt if not _is_whole(token)]:
        raise UserError(f"prompt: {short(others[0])} is no token; expected whole numbers")
    for name in ("max_tokens", "top_k", "seed", "logprobs"):
        value = getattr(sampling, name)
        expect(name, value, _is_whole(value) or (value is None and name != "max_tokens"), "a whole number")
    if bad := [token for token in prompt if not 0 <= token < vocabulary]:
        raise UserError(f"prompt: token {bad[0]} is not in the vocabulary of {vocabulary:,}")
    expect("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1")
    if len(prompt) + sampling.max_tokens > length:
        raise UserError(
            f"max_tokens = {sampling.max_tokens:,}: with a prompt of {len(prompt):,} tokens a slot of {length:,} has "
            f"room for {max(length - len(prompt), 0):,}"
        )
    warm = sampling.temperature
    expect("temperature", warm, 0 <= warm < float("inf"), "0 (take the likeliest token) or more")
    expect("top_k", sampling.top_k, sampling.top_k is None or sampling.top_k >= 1, "at least 1")
    p = sampling.top_p
    expect("top_p", p, p is None or 0 < p <= 1, "more than 0 and at most 1")
    count = sampling.logprobs
    expect("stop_ids", sampling.stop_ids, isinstance(sampling.stop_ids, Collection), "a set of tokens")
    expect("logprobs", count, count is None or 0 <= count <= ALTERNATIVES, f"0 to {ALTERNATIVES}")


def _is_whole(value: object) -> bool:
    """Tell whether a value is an integer: one of Python's, of NumPy's, or an array of JAX's of one."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


@dataclass(frozen=True)
class Drawn:
    """One token of an answer."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability, before temperature, top_k and top_p."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their logarithms, likeliest first."""


class Answer(Protocol):
    """An answer that is being written: its tokens, for any thread."""

    finish_reason: FinishReason | None
    """None until it has ended."""
    error: str | None

    def __iter__(self) -> Iterator[Drawn]:
        """Wait for each token, to the end."""

    def next(self, timeout: float | None = None) -> Drawn | None:
        """Wait for the next token; None at the end. Raises TimeoutError after `timeout` seconds."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, from the engine's thread, whenever there is something to read."""

    def cancel(self) -> None:
        """Give up the answer: its slot is free at the next step."""


class Full(Exception):
    """The queue of an engine has no room for another request."""


class Unavailable(UserError):
    """An engine that is closing, or has failed, takes nothing more."""


@dataclass(frozen=True)
class Counts:
    """Counts of an engine, now and since it began."""

    slots: int
    slots_used: int
    queue: int
    requests_total: int
    prompt_tokens_total: int
    drawn_tokens_total: int


class Engine(Protocol):
    """Writer of answers to many prompts at once."""

    vocabulary: int
    length: int
    """Tokens of prompt and answer that a slot holds."""

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def failed(self) -> str | None:
        """Say why it takes no more requests; None while it does."""

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Answer:
        """Ask for an answer. Raises UserError for a request that makes no sense, Full, and Unavailable."""

    def add_adapter(self, name: str, path: str) -> None:
        """Load an adapter under a name. Raises UserError."""

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out; answers that it has begun end with it. Raises UserError."""

    def counts(self) -> Counts: ...

    def close(self, drain_seconds: float) -> None:
        """Take no more requests, let the others end for so long, and stop."""
