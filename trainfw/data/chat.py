"""Chat templates: Jinja programs that come with a tokenizer and write a conversation as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import tokenizers

from trainfw.data.tokenizer import Tokenizer
from trainfw.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]

SENTINEL = "Xq7sentinel7qX"
"""Stands for a message's content, to see what the template writes around it."""
_MARKS = ("\ue0f1\ue0f2", "\ue0f3\ue0f2")
"""Stand around what `{% generation %}` tags hold: characters for private use, which no text has."""


class TemplateProblem(ValueError):
    """A conversation that the template cannot write, or not so that its turns can be told apart; says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks what the model writes: its body, between `marks`."""

    tags = {"generation"}
    used = False
    """Whether the template has the tag."""
    marks = ("", "")

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body, lineno=line)

    def _marked(self, caller: Callable[[], str]) -> str:
        before, after = self.marks
        return f"{before}{caller()}{after}"


class _Dict:
    """`dict(...)`, without the class's other attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that takes no names which reach into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, and its tokens for what the template writes: those of Transformers."""

    tokenizer: Tokenizer
    source: str
    date: str | None = None
    """The day (YYYY-MM-DD) that it is told, at midnight; None: what the clock says."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, date: str | None = None, *, tools: bool = False) -> ChatTemplate | None:
        """That of the tokenizer, or None where it has none; of several, the one named `default`, or for conversations
        with tools `tool_use`."""
        source = tokenizer.settings.get("chat_template")
        if isinstance(source, list):
            named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
            source = (named.get("tool_use") if tools else None) or named.get("default")
        if not isinstance(source, str) or not source.strip():
            return None
        template = cls(tokenizer, source, date)
        template._compiled  # noqa: B018  a template that is none is refused here
        return template

    @cached_property
    def _environment(self) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
        return jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )

    @property
    def _generation(self) -> _Generation:
        return next(one for one in self._environment.extensions.values() if isinstance(one, _Generation))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # As Transformers does (utils/chat_template_utils.py), so that the text is the same.
        environment = self._environment
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        environment.globals["strftime_now"] = lambda form: self._now.strftime(form)
        # The same conversation is the same text.
        del environment.filters["random"], environment.globals["lipsum"]
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template cannot be read: {error}") from error

    @property
    def has_clock(self) -> bool:
        """Whether the template may ask what day it is."""
        return "strftime_now" in self.source

    @property
    def _now(self) -> datetime:
        return datetime.now() if self.date is None else datetime.fromisoformat(self.date)

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """bos_token, eos_token and the like."""
        backend = self.tokenizer.backend
        variables: dict[str, Any] = {}
        for name, id_ in {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}.items():
            if name == "eos_token" or self.tokenizer.bos_id != self.tokenizer.eos_id:
                variables[name] = backend.id_to_token(id_)
        for name, value in self.tokenizer.settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                variables[name] = text
        return variables

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens' ids by their text."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text. Raises TemplateProblem where the template refuses it."""
        try:
            return self._compiled.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise TemplateProblem(f"the chat template refuses it: {str(error)[:120]}") from error

    def encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Ids and places (in characters) of what `render` wrote, special tokens as such, on all cores."""
        return self.tokenizer.reading_markers.encode_batch(list(texts), add_special_tokens=False)

    @property
    def has_generation_tags(self) -> bool:
        """Whether the template says itself what the model writes."""
        self._compiled  # noqa: B018  the tags are found as it is compiled
        return self._generation.used

    def generated(self, plain: str, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Span] | None:
        """Where in `plain` (the messages as `render` writes them) the template's `{% generation %}` tags stand; None
        where the text is not the same with marks in it."""
        self._generation.marks = _MARKS
        try:
            marked = self.render(messages, tools=tools)
        finally:
            self._generation.marks = ("", "")
        text = ""
        spans: list[list[int]] = []
        for i, part in enumerate(re.split("(" + "|".join(_MARKS) + ")", marked)):
            if i % 2 == 0:
                text += part
            elif part != _MARKS[len(spans) and len(spans[-1]) % 2]:
                return None  # tags within tags, or cut by the template
            elif part == _MARKS[0]:
                spans.append([len(text)])
            else:
                spans[-1].append(len(text))
        return [(start, end) for start, end in spans] if text == plain else None

    def check_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> None:
        """Raise TemplateProblem where the template has no place for a message that is not the assistant's."""
        said = [i for i, m in enumerate(messages) if m["role"] != "assistant" and (m.get("content") or "").strip()]
        every = [marked(message, i) if i in said else message for i, message in enumerate(messages)]
        text = self.render(every, tools=tools)
        for i in said:
            if f"{SENTINEL}{i}q" in text:
                continue
            alone = [*messages[:i], marked(messages[i], i), *messages[i + 1 :]]
            if f"{SENTINEL}{i}q" not in self.render(alone, tools=tools):
                raise TemplateProblem(f"the chat template writes nothing of a message of {messages[i]['role']}")

    @cached_property
    def markers(self) -> dict[str, int]:
        """Tokens that no message may hold, by their text: the special ones, and those added as not special that the
        template writes around a message."""
        return self.special_tokens | self.around_turns

    @property
    def around_turns(self) -> dict[str, int]:
        """Added tokens, special or not, that the template writes between turns or at their end."""
        return self._structure[0]

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        """Matches any of `markers`."""
        return _any_of(self.markers)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn of the assistant."""
        return self._structure[1]

    @cached_property
    def end_pattern(self) -> re.Pattern[str]:
        """Matches a token that ends a turn, or at which generation stops by the tokenizer's files."""
        return _any_of(self._contents({*self.end_ids, *self._stops}))

    @property
    def _stops(self) -> set[int]:
        return {self.tokenizer.eos_id, *self.tokenizer.stop_ids}

    def _contents(self, ids: Iterable[int]) -> dict[str, int]:
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {added[id_].content: id_ for id_ in ids if id_ in added}

    @cached_property
    def _structure(self) -> tuple[dict[str, int], tuple[int, ...]]:
        """Added tokens between turns, and those that end one of the assistant: what follows its content may go on with
        the next turn's header, so that the first one counts at which generation stops, or else the first."""
        words = [f"{SENTINEL}{i}q" for i in range(3)]
        turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": word} for i, word in enumerate(words)]
        between = self._added_after(turns, words[1])
        after = self._added_after(turns[:2], words[1])
        ends = [id_ for id_ in after if id_ in self._stops][:1] or after[:1]
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": words[1]}}}
        after = self._added_after([turns[0], {**turns[1], "content": "", "tool_calls": [call]}], words[1])
        ends += [id_ for id_ in after if id_ in self._stops or id_ in ends][:1] or after[-1:]
        return self._contents((*between, *ends)), tuple(dict.fromkeys(ends))

    def _added_after(self, messages: Sequence[Message], word: str) -> list[int]:
        """Added tokens that are written after `word`; none where the template does not write it."""
        try:
            text = self.render(messages)
        except TemplateProblem:
            return []
        if word not in text:
            return []
        start = text.rindex(word) + len(word)
        added = self.tokenizer.backend.get_added_tokens_decoder()
        encoding = self.encode([text])[0]
        return [id_ for id_, (left, _) in zip(encoding.ids, encoding.offsets) if left >= start and id_ in added]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing where there is none."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def marked(message: Message, number: int = 0) -> Message:
    """The message with a numbered mark after its last word: spaces at the ends may be stripped."""
    content = message["content"]
    words = content.rstrip()
    return {**message, "content": f"{words}{SENTINEL}{number}q{content[len(words) :]}"}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would not take.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens at which generation stops: the end of a document, of a turn as the chat template writes it, and what
    the tokenizer's files name."""
    try:
        template = ChatTemplate.of(tokenizer)
    except UserError:  # said where it is used
        template = None
    ends = () if template is None else template.end_ids
    size = tokenizer.vocab_size
    return tuple(dict.fromkeys(id_ for id_ in (tokenizer.eos_id, *ends, *tokenizer.stop_ids) if id_ < size))


def chat_prompt(tokenizer: Tokenizer, text: str, system_prompt: str | None = None) -> list[int]:
    """Tokens of a user's turn by the tokenizer's chat template, up to where the assistant's begins.

    Raises UserError where it has no template, or the template refuses the messages.
    """
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise UserError("the tokenizer has no chat template; give the text as it is, with --plain")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages = [*system, {"role": "user", "content": text}]
    try:
        rendered = template.render(messages, add_generation_prompt=True)
        template.check_context(messages)
    except TemplateProblem as problem:
        raise UserError(str(problem)) from None
    return list(template.encode([rendered])[0].ids)
