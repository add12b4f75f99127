"""Where in a rendered conversation the turns that are to be learnt stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainfw.data.confined import Problem

if TYPE_CHECKING:
    from trainfw.data.templates import Template

Message = dict[str, Any]
Span = tuple[int, int]

SENTINEL = "Xq7sentinel7qX"
"""Stands for a message's content, to see what the template writes around it."""


class TemplateProblem(Problem):
    """A conversation that the template cannot write, or not so that its turns can be told apart; says why."""


def marked(message: Message, number: int = 0) -> Message:
    """The message with a numbered mark after its last word: spaces at the ends may be stripped."""
    content = message["content"]
    words = content.rstrip()
    return {**message, "content": f"{words}{SENTINEL}{number}q{content[len(words) :]}"}


@dataclass(frozen=True)
class Written:
    """A conversation as text, of which `spans` are learnt."""

    text: str
    spans: list[Span]
    unmet: tuple[str, ...] = ()
    """Prompts for generation with which turns to learn do not begin, such as one that ends in `<think>`."""
    untagged: int = 0
    """Turns to learn that the template's `{% generation %}` tags do not hold."""

    @classmethod
    def of(cls, value: dict[str, Any]) -> Written:
        """Make one from its fields as JSON brings them."""
        spans = [(start, end) for start, end in value["spans"]]
        return cls(**{**value, "spans": spans, "unmet": tuple(value["unmet"])})


@dataclass(frozen=True)
class _Turn:
    """A message as the template writes it last, which is how a model comes to write it."""

    text: str
    """The conversation up to the end of the turn."""
    start: int
    """Where the message begins, after its header."""
    unmet: str = ""

    @property
    def said(self) -> str:
        return self.text[self.start :]

    @property
    def span(self) -> Span:
        return self.start, len(self.text)


def write_learnt(
    template: Template, messages: Sequence[Message], learnt: Sequence[bool], tools: list[object] | None = None
) -> list[Written]:
    """The conversation as text, with the places of its learnt messages: what the template writes of each after its
    header, up to and with the token that ends the turn.

    Where the template has `{% generation %}` tags, they say what the assistant writes. Else a turn is what the template
    writes of it as the last message, and is looked for in the whole conversation; one that is written differently once
    others follow (thinking models drop what earlier turns thought) becomes a text of its own, which ends with it.

    Args:
        learnt: for each message whether it is.

    Raises TemplateProblem where the template leaves out something that is to be learnt, or where it stands cannot be
    told.
    """
    whole = template.render(messages, tools=tools)
    template.check_context(messages, tools)
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i, is_learnt in enumerate(learnt) if is_learnt]
    if template.has_generation_tags and set(wanted) <= set(assistant):
        tagged = _tagged(template, messages, wanted, assistant, whole, tools)
        if tagged is not None:
            return [tagged]
    spans, unmet, apart = [], [], []
    for i in wanted:
        turn = _turn(template, messages, i, whole, tools)
        place = _place(template, messages, i, turn, whole, tools)
        unmet += [turn.unmet] if turn.unmet else []
        if place is None:
            apart.append(Written(turn.text, [turn.span]))
        else:
            spans.append(place)
    written = [*apart, *([Written(whole, spans)] if spans else [])]
    return [replace(written[0], unmet=tuple(unmet)), *written[1:]]


def _tagged(
    template: Template,
    messages: Sequence[Message],
    wanted: list[int],
    assistant: list[int],
    text: str,
    tools: list[object] | None,
) -> Written | None:
    """As the tags say, where it is clear which of them belongs to which message, or all messages are learnt.

    None where they leave out something of a message, as of earlier turns what they thought.
    """
    spans = template.generated(text, messages, tools)
    if spans is None:
        return None
    if len(spans) == len(assistant):
        spans = [span for span, i in zip(spans, assistant) if i in wanted]
        for span, i in zip(spans, wanted):
            through = template.render(messages[: i + 1], tools=tools)
            try:
                _check_written(template, messages[: i + 1], through, text[slice(*span)], tools)
            except TemplateProblem:
                return None
    elif wanted != assistant:
        return None
    ended = [(start, start + len(_ended(template, text[start:end]))) for start, end in spans]
    return Written(text, ended, untagged=max(len(assistant) - len(spans), 0) if wanted == assistant else 0)


def _turn(template: Template, messages: Sequence[Message], i: int, whole: str, tools: list[object] | None) -> _Turn:
    through = whole if i + 1 == len(messages) else template.render(messages[: i + 1], tools=tools)
    prompt = ""
    if messages[i]["role"] == "assistant":
        prompt = _try(template, messages[:i], tools, prompt=True)
    unmet = ""
    if prompt and through.startswith(prompt):
        start = len(prompt)
    else:
        start = _content_start(template, messages, i, through, tools)
        unmet = prompt.removeprefix(_try(template, messages[:i], tools, prompt=False))
    said = _ended(template, through[start:])
    _check_written(template, messages[: i + 1], through, said, tools)
    return _Turn(through[:start] + said, start, unmet)


def _try(template: Template, messages: Sequence[Message], tools: list[object] | None, *, prompt: bool) -> str:
    """Some templates refuse a conversation without a message, or one that ends so."""
    try:
        return template.render(messages, tools=tools, add_generation_prompt=prompt)
    except TemplateProblem:
        return ""


def _content_start(
    template: Template, messages: Sequence[Message], i: int, through: str, tools: list[object] | None
) -> int:
    shown = {**messages[i], "content": SENTINEL}
    header, found, _ = template.render([*messages[:i], shown], tools=tools).rpartition(SENTINEL)
    every = [{**message, "content": f"{SENTINEL}{j}q"} for j, message in enumerate(messages[: i + 1])]
    is_last = template.render(every, tools=tools).rpartition(SENTINEL)[2].startswith(f"{i}q")
    if not found or not is_last or not through.startswith(header):
        raise TemplateProblem("the chat template writes a turn so that its beginning cannot be told")
    return len(header)


def _ended(template: Template, said: str) -> str:
    """Without what follows the token that ends the turn, which is not for the model to write."""
    if end := template.end_pattern.search(said):
        return said[: end.end()]
    ends = [match.end() for match in template.marker_pattern.finditer(said)]
    return said[: ends[-1]] if ends and not said[ends[-1] :].strip() else said


def _check_written(
    template: Template, messages: Sequence[Message], through: str, said: str, tools: list[object] | None
) -> None:
    """Raise TemplateProblem where the last message, which is to be learnt, is not in what is written of it.

    Args:
        through: the conversation up to it, as text.
        said: what of that is the message's.
    """
    *before, message = messages
    if not template.marker_pattern.sub("", said).strip():
        raise TemplateProblem("the chat template writes nothing of a message to learn")
    if message.get("tool_calls"):
        bare = {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
        if _try(template, [*before, bare], tools, prompt=False) == through:
            raise TemplateProblem("the chat template writes nothing of tool_calls to learn")
    if not _holds(said, message.get("content") or ""):
        raise TemplateProblem("the chat template leaves out something of a message to learn")


def _holds(text: str, content: str) -> bool:
    """Whether the words of `content` are in `text`, in their order: spaces may be others, and tags (`<think>`)."""
    if content.strip() in text:
        return True
    at = 0
    for word in re.sub(r"</?\w+>", " ", content).split():
        if (found := text.find(word, at)) < 0:
            return False
        at = found + len(word)
    return True


def _place(
    template: Template, messages: Sequence[Message], i: int, turn: _Turn, whole: str, tools: list[object] | None
) -> Span | None:
    """Where the turn stands in the whole conversation; None where it is not written there as it is when it is last."""
    if whole.startswith(turn.text):
        return turn.span
    if not (messages[i].get("content") or "").strip():
        return None
    message, mark = marked(messages[i]), f"{SENTINEL}0q"
    last = template.render([*messages[:i], message], tools=tools)
    among = template.render([*messages[:i], message, *messages[i + 1 :]], tools=tools)
    # The mark has to change nothing else, or it says nothing of where the turn stands.
    if among.count(mark) != 1 or among.replace(mark, "") != whole or last.count(mark) != 1:
        return None
    start = among.index(mark) - (last.index(mark) - turn.start)
    end = start + len(turn.said)
    same = whole[start:end] == turn.said and whole[:start].endswith(_header(template, messages, i, tools))
    return (start, end) if same else None


def _header(template: Template, messages: Sequence[Message], i: int, tools: list[object] | None) -> str:
    """What the template puts before a turn of the assistant; empty where it has no such prompt."""
    if messages[i]["role"] != "assistant":
        return ""
    before, prompt = (_try(template, messages[:i], tools, prompt=prompt) for prompt in (False, True))
    return prompt.removeprefix(before) if prompt.startswith(before) else ""
