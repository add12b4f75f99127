"""Texts from tokens, with stop strings and calls of tools; and forms that an answer must have."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw.data import byte_tokenizer
from trainfw.errors import UserError
from trainfw.serving import Drawn
from trainfw.serving.grammar import Grammars
from trainfw.serving.text import AnswerText, ToolCalls, held

BYTES = byte_tokenizer()


@given(st.text("abé😀", max_size=30), st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_nothing_is_taken_back(text, stops):
    answer, given_text, given_tokens = AnswerText(BYTES, stops), "", []
    for byte in text.encode():
        answer.push(Drawn(byte))
        piece, tokens = answer.take()
        assert "\ufffd" not in piece
        given_text, given_tokens = given_text + piece, given_tokens + tokens
        waiting = given_text + answer._pending
        assert held(waiting, stops) >= len(answer._pending) or answer.ended  # no more is held back than has to be
    answer.end()
    piece, tokens = answer.take()
    given_text, given_tokens = given_text + piece, given_tokens + tokens
    # A stop string that ends first is met first, and of those the one that begins first.
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    met = [text[: min(ends)].find(stop) for stop in stops] if ends else []
    assert given_text == (text[: min(place for place in met if place >= 0)] if ends else text)
    assert bytes(token.drawn.token for token in given_tokens) == given_text.encode()


def test_bytes_that_are_no_character_are_given_at_the_end_alone():
    answer = AnswerText(BYTES)
    for byte in b"a\xf0\x9f":
        answer.push(Drawn(byte))
    assert answer.take()[0] == "a"
    answer.end()
    assert answer.take()[0] == "\ufffd"


CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
CALLS = {
    f"Well. {CALL}": ("Well. ", [("f", '{"x": 1}')]),
    f"{CALL}\n{CALL}\n": ("", [("f", '{"x": 1}')] * 2),
    '<tool_call>[{"name": "f"}]</tool_call>': ("", [("f", "{}")]),
    f"{CALL} and so on": ("and so on", [("f", '{"x": 1}')]),
    "a < b <tool": ("a < b <tool", []),
    "<tool_call>{}</tool_call>": ("<tool_call>{}</tool_call>", []),
    '<tool_call>{"name": "f"}': ('<tool_call>{"name": "f"}', []),
    '<tool_call>{"arguments": {}}</tool_call>': ('<tool_call>{"arguments": {}}</tool_call>', []),
}  # fmt: skip


@pytest.mark.parametrize("text", CALLS)
@pytest.mark.parametrize("size", [1, 5, 99])
def test_calls_of_tools(text, size):
    calls = ToolCalls()
    content = "".join(calls.push(text[i : i + size]) for i in range(0, len(text), size))
    rest, found = calls.end()
    assert (content + rest, found) == CALLS[text]


def draw(matcher, seed, most=2000):
    """Draw what a constraint allows; end where it may."""
    random, text = np.random.default_rng(seed), b""
    for _ in range(most):
        allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")).tolist()
        token = 257 if 257 in allowed else int(random.choice(allowed))
        if token == 257:
            break
        text += bytes([token])
        matcher.accept(token)
        if matcher.ended:
            break
    assert matcher.problem is None
    return text.decode()


def test_answers_of_a_form():
    grammars = Grammars(BYTES, 300, [257])
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": [1]}}},
    }
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    for seed in range(10):
        found = json.loads(draw(grammars.constraint("json_schema", schema), seed))
        assert isinstance(found["a"], int)
        assert set(found["b"]) <= {1}
        assert set(draw(grammars.constraint("regex", "[é😀]{3}"), seed)) <= set("é😀")
    assert len(grammars.constraint("regex", "a").allowed()) == 10  # words for 300 tokens
    for kind, form in (("regex", "("), ("json_schema", {"type": "pet"}), ("json_schema", {"not": {}})):
        with pytest.raises(UserError, match="response_format: "):
            grammars.constraint(kind, form)


def test_a_form_that_is_not_kept_is_a_problem_and_no_error():
    matcher = Grammars(BYTES, 258, [257]).constraint("regex", "a+b")
    matcher.accept(ord("x"))
    assert matcher.problem
    assert matcher.ended
    assert matcher.allowed().all()
