"""Answers of a given form, a JSON schema or a regular expression, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from functools import cached_property

import llguidance
import numpy as np

from trainfw.data import Tokenizer
from trainfw.errors import UserError, short


class Matcher:
    """A `Constraint` that a grammar makes. It never raises, for the engine's thread asks it: see `problem`."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self._matcher, self._words = matcher, words
        self.problem: str | None = None
        """Reason why the answer is not of the form, where the grammar took too much work or left nothing to draw."""

    def allowed(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        if self._matcher.is_error() or not mask.any():
            self.problem = self._matcher.get_error() or "the form leaves no token to draw"
            return np.full(self._words, 2**32 - 1, np.uint32)
        return mask

    def accept(self, token: int) -> None:
        if self.problem is None and not self._matcher.consume_token(token):
            self.problem = self._matcher.get_error()

    @property
    def ended(self) -> bool:
        return self.problem is not None or bool(self._matcher.is_stopped())


class Grammars:
    """Maker of constraints for one tokenizer and vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Iterable[int]):
        """`ends`: tokens that end an answer."""
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._lock = threading.Lock()

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            self._tokenizer.backend.to_str(), n_vocab=self._vocabulary, eos_token=self._ends or None
        )

    def constraint(self, kind: str, form: object) -> Matcher:
        """Make a constraint from a schema (`json_schema`) or an expression (`regex`).

        JSON is written without spaces between its parts. Raises UserError for what llguidance does not take, which
        includes keywords of JSON Schema that it would have to leave out.
        """
        if kind == "regex":
            grammar = llguidance.LLMatcher.grammar_from_regex(str(form))
        else:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(form), overrides={"whitespace_flexible": False}
            )
        with self._lock:  # the first use makes the table of tokens
            tokens = self._tokens
        if problem := llguidance.LLMatcher.validate_grammar(grammar, tokens):
            raise UserError(f"response_format: {kind} {short(form, 40)}: {' '.join(problem.split())[:200]}")
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"response_format: {kind} {short(form, 40)}: {matcher.get_error()[:200]}")
        return Matcher(matcher, -(-self._vocabulary // 32))
