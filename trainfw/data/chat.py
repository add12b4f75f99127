"""Chat templates: Jinja programs, part of a tokenizer, that write a conversation as text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

from trainfw.confined import Problem, UnusableError, helper
from trainfw.data.tokenizer import FAILS, Tokenizer
from trainfw.data.trials import guarded
from trainfw.data.turns import SENTINEL, Message, TemplateProblem, Written
from trainfw.errors import UserError


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template; texts and tokens are those of Transformers."""

    tokenizer: Tokenizer
    source: str
    date: str | None = None
    """Day (YYYY-MM-DD, at midnight) that its clock shows; None: the true time."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, date: str | None = None, *, tools: bool = False) -> ChatTemplate | None:
        """Return the tokenizer's template; None where it has none.

        Of several templates it is the one named `default`, or `tool_use` for conversations with `tools`. Raises
        UserError where the template cannot be read.
        """
        source = tokenizer.settings.get("chat_template")
        if isinstance(source, list):
            named = {str(one.get("name")): one.get("template") for one in source if isinstance(one, dict)}
            source = (named.get("tool_use") if tools else None) or named.get("default")
        if not isinstance(source, str) or not source.strip():
            return None
        template = cls(tokenizer, source, date)
        template.has_generation_tags  # noqa: B018  compiles it, and refuses it where it cannot be read
        return template

    @classmethod
    def usable(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the tokenizer's template; None where it has none, or one that will be refused when it is used.

        Raises UnusableError where it takes too much time or memory.
        """
        try:
            return cls.of(tokenizer)
        except UnusableError:
            raise
        except UserError:
            return None

    @cached_property
    def has_generation_tags(self) -> bool:
        """Flag: the template itself marks what the model writes. Raises UserError for one that cannot be read."""
        return bool(self._ask("has_generation_tags"))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[object] | None = None
    ) -> str:
        """Render the conversation as text.

        Raises TemplateProblem where the template refuses it, UserError where it reaches a limit of `confined`.
        """
        return str(self._ask("render", list(messages), add_generation_prompt, tools))

    def check_context(self, messages: Sequence[Message], tools: list[object] | None = None) -> None:
        """Raise TemplateProblem where the template has no place for a message that is not the assistant's."""
        self._ask("check_context", list(messages), tools)

    def write_learnt(self, conversations: Iterable[tuple[Any, ...]]) -> list[list[Written] | TemplateProblem]:
        """Call `turns.write_learnt` for each conversation, given by the arguments after the template.

        One request to the helper serves all of them, since each needs many renderings.
        """
        with self._blamed():
            fields = (*self._fields[:3], self.marker_pattern.pattern, self.end_pattern.pattern)
            answers = helper.call_each("data.templates:write", fields, conversations)
        return [
            TemplateProblem(str(one)) if isinstance(one, Problem) else [Written.of(written) for written in one]
            for one in answers
        ]

    @cached_property
    def _fields(self) -> tuple[object, ...]:
        """Fields of `templates.Template`, as long as the tokens that end a turn are unknown."""
        tokenizer = self.tokenizer
        variables: dict[str, object] = {"eos_token": tokenizer.backend.id_to_token(tokenizer.eos_id)}
        if tokenizer.bos_id != tokenizer.eos_id:
            variables["bos_token"] = tokenizer.backend.id_to_token(tokenizer.bos_id)
        for name, value in tokenizer.settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                variables[name] = text
        return self.source, tuple(variables.items()), self.date, "(?!)", "(?!)"

    def _ask(self, what: str, *arguments: Any) -> Any:
        with self._blamed():
            return helper.call("data.templates:ask", self._fields, what, *arguments)

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Name the template's file in what a UserError says."""
        try:
            yield
        except Problem as problem:
            raise TemplateProblem(str(problem)) from None
        except RecursionError:  # on its way to the helper
            raise TemplateProblem("the conversation is nested too deeply") from None
        except UserError as error:
            where = self.tokenizer.template_file or "the tokenizer"
            kind = UnusableError if isinstance(error, UnusableError) else UserError
            raise kind(f"{where}: the chat template {error}") from None

    def encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Encode texts that `render` wrote, special tokens as such, on all cores; offsets count characters."""
        with guarded(FAILS):
            return self.tokenizer.reading_markers.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def markers(self) -> dict[str, int]:
        """Ids of the tokens that no message may hold, by their text: special tokens, and other added tokens that the
        template writes around a message."""
        return self.tokenizer.special_tokens | self.around_turns

    @cached_property
    def around_turns(self) -> dict[str, int]:
        """Ids of the added tokens, special or not, that the template writes between turns or at their end, by text."""
        return self._contents((*self._added_after(_TURNS), *self.end_ids))

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        """Pattern of any of `markers`."""
        return _any_of(self.markers)

    @cached_property
    def end_pattern(self) -> re.Pattern[str]:
        """Pattern of the tokens that end a turn, or at which the tokenizer's files stop generation."""
        return _any_of(self._contents({*self.end_ids, self.tokenizer.eos_id, *self.tokenizer.stop_ids}))

    def _contents(self, ids: Iterable[int]) -> dict[str, int]:
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {added[id_].content: id_ for id_ in ids if id_ in added}

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a turn of the assistant.

        The text after a turn's content may go on with the next turn's header: the first token there at which generation
        stops ends the turn, or else the first one.
        """
        stops = {self.tokenizer.eos_id, *self.tokenizer.stop_ids}
        after = self._added_after(_TURNS[:2])
        ends = [id_ for id_ in after if id_ in stops][:1] or after[:1]
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": _WORD}}}
        after = self._added_after([_TURNS[0], {**_TURNS[1], "content": "", "tool_calls": [call]}])
        ends += [id_ for id_ in after if id_ in stops or id_ in ends][:1] or after[-1:]
        return tuple(dict.fromkeys(ends))

    def _added_after(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the added tokens after `_WORD`; none where the template does not write it."""
        try:
            text = self.render(messages)
        except TemplateProblem:
            return []
        if _WORD not in text:
            return []
        start = text.rindex(_WORD) + len(_WORD)
        added = self.tokenizer.backend.get_added_tokens_decoder()
        encoding = self.encode([text])[0]
        return [id_ for id_, (left, _) in zip(encoding.ids, encoding.offsets) if left >= start and id_ in added]


_WORD = f"{SENTINEL}1q"
_TURNS: list[Message] = [
    {"role": role, "content": f"{SENTINEL}{i}q"} for i, role in enumerate(("user", "assistant", "user"))
]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of `texts`, the longest first; without texts it matches nothing."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids at which generation stops: the end of a document, of a turn of the chat template, and those that
    the tokenizer's files name."""
    template = ChatTemplate.usable(tokenizer)
    ends = () if template is None else template.end_ids
    size = tokenizer.vocab_size
    return tuple(dict.fromkeys(id_ for id_ in (tokenizer.eos_id, *ends, *tokenizer.stop_ids) if id_ < size))


def chat_prompt(tokenizer: Tokenizer, text: str, system_prompt: str | None = None) -> list[int]:
    """Return the ids of a user's turn by the tokenizer's chat template, up to the beginning of the assistant's turn.

    Raises UserError where there is no template, or it refuses the messages.
    """
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise UserError("the tokenizer has no chat template; give the text as it is, with chat=False (--plain)")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages = [*system, {"role": "user", "content": text}]
    try:
        rendered = template.render(messages, add_generation_prompt=True)
        template.check_context(messages)
    except TemplateProblem as problem:
        raise UserError(str(problem)) from None
    return list(template.encode([rendered])[0].ids)
