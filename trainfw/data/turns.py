"""Search for the turns to learn in a rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainfw.confined import Problem

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
    conversation = _Conversation(template, messages, tools)
    whole = conversation.whole
    template.check_context(messages, tools)
    wanted = [i for i, is_learnt in enumerate(learnt) if is_learnt]
    tagged = conversation.tagged(wanted)
    if tagged is not None:
        return [tagged]
    spans, unmet, apart = [], [], []
    for i in wanted:
        turn = conversation.turn(i)
        place = conversation.place(i, turn)
        unmet += [turn.unmet] if turn.unmet else []
        if place is None:
            apart.append(Written(turn.text, [turn.span]))
        else:
            spans.append(place)
    written = [*apart, *([Written(whole, spans)] if spans else [])]
    return [replace(written[0], unmet=tuple(unmet)), *written[1:]]


class _Conversation:
    """A conversation that a template writes, whole (`whole`) and in parts."""

    def __init__(self, template: Template, messages: Sequence[Message], tools: list[object] | None) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self.whole = self.text(messages)

    def text(self, messages: Sequence[Message]) -> str:
        return self.template.render(messages, tools=self.tools)

    def part(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Render messages, or return nothing where the template refuses them, as some do without any message."""
        try:
            return self.template.render(messages, tools=self.tools, add_generation_prompt=prompt)
        except TemplateProblem:
            return ""

    def tagged(self, wanted: list[int]) -> Written | None:
        """Return the text with the spans that the template's tags give; None where it has no tags.

        Returns None also where it is not clear to which messages they belong (unless all are learnt), or where they
        leave out something of a message, such as the thoughts of earlier turns.
        """
        assistant = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not self.template.has_generation_tags or not set(wanted) <= set(assistant):
            return None
        spans = self.template.generated(self.whole, self.messages, self.tools)
        if spans is None:
            return None
        if len(spans) == len(assistant):
            spans = [span for span, i in zip(spans, assistant) if i in wanted]
            for span, i in zip(spans, wanted):
                through = self.text(self.messages[: i + 1])
                try:
                    self.check_written(i, through, self.whole[slice(*span)])
                except TemplateProblem:
                    return None
        elif wanted != assistant:
            return None
        ended = [(start, start + len(self.ended(self.whole[start:end]))) for start, end in spans]
        untagged = max(len(assistant) - len(spans), 0) if wanted == assistant else 0
        return Written(self.whole, ended, untagged=untagged)

    def turn(self, i: int) -> _Turn:
        through = self.whole if i + 1 == len(self.messages) else self.text(self.messages[: i + 1])
        assistant = self.messages[i]["role"] == "assistant"
        prompt = self.part(self.messages[:i], prompt=True) if assistant else ""
        unmet = ""
        if prompt and through.startswith(prompt):
            start = len(prompt)
        else:
            bare = [*self.messages[:i], {**self.messages[i], "content": SENTINEL}]
            header, mark, _ = self.text(bare).rpartition(SENTINEL)
            every = [{**message, "content": f"{SENTINEL}{j}q"} for j, message in enumerate(self.messages[: i + 1])]
            is_last = self.text(every).rpartition(SENTINEL)[2].startswith(f"{i}q")
            if not mark or not is_last or not through.startswith(header):
                raise TemplateProblem("the chat template writes a turn so that its beginning cannot be told")
            start = len(header)
            unmet = prompt.removeprefix(self.part(self.messages[:i], prompt=False))
        turn = self.ended(through[start:])
        self.check_written(i, through, turn)
        return _Turn(through[:start] + turn, start, unmet)

    def ended(self, turn: str) -> str:
        """Cut off what follows the token that ends the turn, which the model is not to write."""
        if end := self.template.end_pattern.search(turn):
            return turn[: end.end()]
        ends = [match.end() for match in self.template.marker_pattern.finditer(turn)]
        return turn[: ends[-1]] if ends and not turn[ends[-1] :].strip() else turn

    def check_written(self, i: int, through: str, turn: str) -> None:
        """Raise TemplateProblem where the template leaves out something of message i, which is to be learnt.

        Args:
            through: the conversation up to and with this message, as text.
            turn: the part of that text which is the message's.
        """
        message = self.messages[i]
        if not self.template.marker_pattern.sub("", turn).strip():
            raise TemplateProblem("the chat template writes nothing of a message to learn")
        if message.get("tool_calls"):
            bare = {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
            if self.part([*self.messages[:i], bare], prompt=False) == through:
                raise TemplateProblem("the chat template writes nothing of tool_calls to learn")
        if not _holds(turn, message.get("content") or ""):
            raise TemplateProblem("the chat template leaves out something of a message to learn")

    def place(self, i: int, turn: _Turn) -> Span | None:
        """Return the turn's span in the whole conversation; None where it is written differently there."""
        if self.whole.startswith(turn.text):
            return turn.span
        before, message, after = self.messages[:i], self.messages[i], self.messages[i + 1 :]
        if not (message.get("content") or "").strip():
            return None
        mark = f"{SENTINEL}0q"
        last, among = (self.text([*before, marked(message), *rest]) for rest in ((), after))
        # A mark that changes other text does not show the turn's place.
        if among.count(mark) != 1 or among.replace(mark, "") != self.whole or last.count(mark) != 1:
            return None
        start = among.index(mark) - (last.index(mark) - turn.start)
        end = start + len(turn.text) - turn.start
        header = ""  # the text that the template puts before a turn of the assistant, if it has such a prompt
        if message["role"] == "assistant":
            without, prompt = (self.part(before, prompt=prompt) for prompt in (False, True))
            header = prompt.removeprefix(without) if prompt.startswith(without) else ""
        same = self.whole[start:end] == turn.text[turn.start :] and self.whole[:start].endswith(header)
        return (start, end) if same else None


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
