"""Search for the turns to learn in a rendered conversation."""

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
    """Reason why the template cannot write a conversation, or writes it so that its turns cannot be told apart."""


def marked(message: Message, number: int = 0) -> Message:
    """Return the message with a numbered mark after its last word: a template may strip spaces at the ends."""
    content = message["content"]
    words = content.rstrip()
    return {**message, "content": f"{words}{SENTINEL}{number}q{content[len(words) :]}"}


@dataclass(frozen=True)
class Written:
    """A conversation as text, of which `spans` are learnt."""

    text: str
    spans: list[Span]
    unmet: tuple[str, ...] = ()
    """Prompts for generation that the turns to learn do not begin with, such as one that ends in `<think>`."""
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
    """Conversation up to the end of the turn."""
    start: int
    """Place in `text` at which the message begins, after its header."""
    unmet: str = ""

    @property
    def message(self) -> str:
        return self.text[self.start :]

    @property
    def span(self) -> Span:
        return self.start, len(self.text)


def write_learnt(
    template: Template, messages: Sequence[Message], learnt: Sequence[bool], tools: list[object] | None = None
) -> list[Written]:
    """Write the conversation as text, with the spans of its learnt messages.

    A span runs from the end of the message's header to the end of the token that ends the turn. `{% generation %}`
    tags of the template, if any, give the spans of the assistant's messages. Else a turn is the text that the template
    writes for it as the last message, which is looked for in the whole conversation. A turn that is written differently
    once others follow (thinking models drop the thoughts of earlier turns) becomes a text of its own, which it ends.

    Args:
        learnt: flag of each message: it is to be learnt.

    Raises TemplateProblem where the template leaves out something to learn, or its place cannot be told.
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
    """Return the text with the spans that the template's tags give.

    Returns None where it is not clear to which messages they belong (unless all are learnt), or where they leave out
    something of a message, such as the thoughts of earlier turns.
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
    turn = _ended(template, through[start:])
    _check_written(template, messages[: i + 1], through, turn, tools)
    return _Turn(through[:start] + turn, start, unmet)


def _try(template: Template, messages: Sequence[Message], tools: list[object] | None, *, prompt: bool) -> str:
    """Render messages, or return nothing where the template refuses them, as some do without any message."""
    try:
        return template.render(messages, tools=tools, add_generation_prompt=prompt)
    except TemplateProblem:
        return ""


def _content_start(
    template: Template, messages: Sequence[Message], i: int, through: str, tools: list[object] | None
) -> int:
    shown = {**messages[i], "content": SENTINEL}
    header, mark, _ = template.render([*messages[:i], shown], tools=tools).rpartition(SENTINEL)
    every = [{**message, "content": f"{SENTINEL}{j}q"} for j, message in enumerate(messages[: i + 1])]
    is_last = template.render(every, tools=tools).rpartition(SENTINEL)[2].startswith(f"{i}q")
    if not mark or not is_last or not through.startswith(header):
        raise TemplateProblem("the chat template writes a turn so that its beginning cannot be told")
    return len(header)


def _ended(template: Template, turn: str) -> str:
    """Cut off what follows the token that ends the turn, which the model is not to write."""
    if end := template.end_pattern.search(turn):
        return turn[: end.end()]
    ends = [match.end() for match in template.marker_pattern.finditer(turn)]
    return turn[: ends[-1]] if ends and not turn[ends[-1] :].strip() else turn


def _check_written(
    template: Template, messages: Sequence[Message], through: str, turn: str, tools: list[object] | None
) -> None:
    """Raise TemplateProblem where the template leaves out something of the last message, which is to be learnt.

    Args:
        through: the conversation up to and with this message, as text.
        turn: the part of that text which is the message's.
    """
    *before, message = messages
    if not template.marker_pattern.sub("", turn).strip():
        raise TemplateProblem("the chat template writes nothing of a message to learn")
    if message.get("tool_calls"):
        bare = {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
        if _try(template, [*before, bare], tools, prompt=False) == through:
            raise TemplateProblem("the chat template writes nothing of tool_calls to learn")
    if not _holds(turn, message.get("content") or ""):
        raise TemplateProblem("the chat template leaves out something of a message to learn")


def _holds(text: str, content: str) -> bool:
    """Tell whether `text` holds the words of `content` in order; spaces and tags (`<think>`) may differ."""
    if content.strip() in text:
        return True
    at = 0
    for word in re.sub(r"</?\w+>", " ", content).split():
        if (start := text.find(word, at)) < 0:
            return False
        at = start + len(word)
    return True


def _place(
    template: Template, messages: Sequence[Message], i: int, turn: _Turn, whole: str, tools: list[object] | None
) -> Span | None:
    """Return the turn's span in the whole conversation; None where it is written differently there."""
    if whole.startswith(turn.text):
        return turn.span
    if not (messages[i].get("content") or "").strip():
        return None
    message, mark = marked(messages[i]), f"{SENTINEL}0q"
    last = template.render([*messages[:i], message], tools=tools)
    among = template.render([*messages[:i], message, *messages[i + 1 :]], tools=tools)
    # A mark that changes other text does not show the turn's place.
    if among.count(mark) != 1 or among.replace(mark, "") != whole or last.count(mark) != 1:
        return None
    start = among.index(mark) - (last.index(mark) - turn.start)
    end = start + len(turn.message)
    same = whole[start:end] == turn.message and whole[:start].endswith(_header(template, messages, i, tools))
    return (start, end) if same else None


def _header(template: Template, messages: Sequence[Message], i: int, tools: list[object] | None) -> str:
    """Return the text that the template puts before a turn of the assistant; empty where it has no such prompt."""
    if messages[i]["role"] != "assistant":
        return ""
    before, prompt = (_try(template, messages[:i], tools, prompt=prompt) for prompt in (False, True))
    return prompt.removeprefix(before) if prompt.startswith(before) else ""
