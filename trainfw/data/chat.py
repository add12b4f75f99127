"""Chat templates: Jinja programs that come with a tokenizer and write a conversation as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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

_SENTINEL = "Xq7sentinel7qX"
"""Stands for a message's content, to see what the template writes before it."""


class TemplateProblem(ValueError):
    """A conversation that the template cannot write, or not so that its turns can be told apart; says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks what the model writes: its body, as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


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

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """That of the tokenizer (the one named `default` of several), or None where it has none."""
        source = tokenizer.settings.get("chat_template")
        if isinstance(source, list):
            named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source.strip():
            return None
        template = cls(tokenizer, source)
        template._compiled  # noqa: B018  a template that is none is refused here
        return template

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # As Transformers does (utils/chat_template_utils.py), so that the text is the same.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template cannot be read: {error}") from error

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
    def _backend(self) -> tokenizers.Tokenizer:
        """Reads special tokens as such, as the tokenizer itself does not."""
        state = json.loads(self.tokenizer.backend.to_str())
        # What it adds is not asked for, and one of the byte-level ones would cut the spaces off the tokens' places.
        state["post_processor"] = None
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        backend.encode_special_tokens = False
        return backend

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
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def spans(
        self, text: str, messages: Sequence[Message], learnt: Callable[[Message], bool], tools: list[Any] | None = None
    ) -> list[Span]:
        """Where in `text` (the rendered messages) stands what the template writes of each learnt message after its
        header: the content, and what ends the turn.

        A template must only append: the text of the first messages begins that of all of them. The header of an
        assistant's message is what the generation prompt writes, that of any other what stands before its content.
        Raises TemplateProblem where that does not hold, since the spans would then be wrong.
        """
        found = []
        for i, message in enumerate(messages):
            if not learnt(message):
                continue
            through = text if i + 1 == len(messages) else self.render(messages[: i + 1], tools=tools)
            start = self._header_end(text, messages, i, tools)
            if start is None or not text.startswith(through) or not start < len(through):
                raise TemplateProblem("the chat template writes a turn differently once others follow")
            found.append((start, len(through)))
        return found

    def _header_end(self, text: str, messages: Sequence[Message], i: int, tools: list[Any] | None) -> int | None:
        if messages[i]["role"] == "assistant":
            try:
                header = self.render(messages[:i], add_generation_prompt=True, tools=tools)
            except TemplateProblem:
                header = ""  # some refuse a conversation without a message
            if header and text.startswith(header):
                return len(header)
        shown = {**messages[i], "content": _SENTINEL}
        header, found, _ = self.render([*messages[:i], shown], tools=tools).rpartition(_SENTINEL)
        return len(header) if found and text.startswith(header) else None


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would not take.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def chat_prompt(tokenizer: Tokenizer, text: str, system_prompt: str | None = None) -> list[int]:
    """Tokens of a user's turn by the tokenizer's chat template, up to where the assistant's begins.

    Raises UserError where it has no template, or the template refuses the messages.
    """
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise UserError("the tokenizer has no chat template; give the text as it is, with --plain")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    try:
        rendered = template.render([*system, {"role": "user", "content": text}], add_generation_prompt=True)
    except TemplateProblem as problem:
        raise UserError(str(problem)) from None
    return list(template.encode([rendered])[0].ids)
