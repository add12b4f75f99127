"""Chat templates, run by Jinja. Only the helper process (`confined.py`) imports this: templates are programs."""

from __future__ import annotations

import functools
import json
import re
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

from trainfw.confined import work
from trainfw.data.turns import SENTINEL, Message, Span, TemplateProblem, marked, write_learnt
from trainfw.errors import UserError

_MARKS = ("\ue0f1\ue0f2", "\ue0f3\ue0f2")
"""Marks put around the body of `{% generation %}` tags: characters for private use, which no text has."""


class _Generation(jinja2.ext.Extension):
    """Tags `{% generation %}` ... `{% endgeneration %}` around what the model writes; it is put between `marks`."""

    tags = {"generation"}
    used = False
    """Flag: the template has the tag."""
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

    def __init__(*args: object, **values: object) -> None:
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: object) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")


@dataclass(frozen=True)
class Template:
    """A chat template with the variables that it gets besides messages."""

    source: str
    variables: tuple[tuple[str, Any], ...]
    """bos_token, eos_token and the like."""
    date: str | None
    """Day (YYYY-MM-DD, at midnight) that its clock shows; None: the true time."""
    markers: str
    ends: str
    """Regular expressions for the tokens that no message may hold, and for those that end a turn."""

    @cached_property
    def _compiled(self) -> tuple[jinja2.Template, _Generation]:
        # As Transformers does (utils/chat_template_utils.py), so that the text is the same.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        day = None if self.date is None else datetime.fromisoformat(self.date)
        environment.globals["strftime_now"] = lambda form: (day or datetime.now()).strftime(form)
        # The same conversation is the same text.
        del environment.filters["random"], environment.globals["lipsum"]
        try:
            template = environment.from_string(self.source)
        except MemoryError:
            raise
        except Exception as error:  # Python's compiler reads what Jinja writes, and has limits of its own
            raise UserError(f"cannot be read: {_line(error)}") from error
        return template, next(one for one in environment.extensions.values() if isinstance(one, _Generation))

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        return re.compile(self.markers)

    @cached_property
    def end_pattern(self) -> re.Pattern[str]:
        return re.compile(self.ends)

    @property
    def has_generation_tags(self) -> bool:
        """Flag: the template itself marks what the model writes."""
        return self._compiled[1].used  # compiling it finds the tags

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[object] | None = None
    ) -> str:
        """Render the conversation as text. Raises TemplateProblem where the template refuses it."""
        compiled, _ = self._compiled
        work.begin_piece()
        try:
            text = compiled.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **dict(self.variables),
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            raise TemplateProblem(f"the chat template refuses it: {_line(error)}") from error
        return work.check_written(text)

    def generated(
        self, plain: str, messages: Sequence[Message], tools: list[object] | None = None
    ) -> list[Span] | None:
        """Return the spans of the template's `{% generation %}` tags in `plain`, the messages' text without marks.

        Returns None where marks change the text.
        """
        _, generation = self._compiled
        generation.marks = _MARKS
        try:
            marked = self.render(messages, tools=tools)
        finally:
            generation.marks = ("", "")
        text = ""
        ends: list[int] = []
        for i, part in enumerate(re.split("(" + "|".join(_MARKS) + ")", marked)):
            if i % 2 == 0:
                text += part
            elif part != _MARKS[len(ends) % 2]:
                return None  # tags within tags, or cut by the template
            else:
                ends.append(len(text))
        return list(zip(ends[::2], ends[1::2], strict=True)) if text == plain else None

    def check_context(self, messages: Sequence[Message], tools: list[object] | None = None) -> None:
        """Raise TemplateProblem where the template has no place for a message that is not the assistant's."""
        context = [i for i, m in enumerate(messages) if m["role"] != "assistant" and (m.get("content") or "").strip()]
        every = [marked(message, i) if i in context else message for i, message in enumerate(messages)]
        text = self.render(every, tools=tools)
        for i in context:
            if f"{SENTINEL}{i}q" in text:
                continue
            alone = [*messages[:i], marked(messages[i], i), *messages[i + 1 :]]
            if f"{SENTINEL}{i}q" not in self.render(alone, tools=tools):
                raise TemplateProblem(f"the chat template writes nothing of a message of {messages[i]['role']}")


def _line(error: Exception) -> str:
    text = "it is nested, or calls itself, too deeply" if isinstance(error, RecursionError) else str(error)
    return " ".join(text[:400].split())[:120]


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would not take.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# --- Functions for the helper's requests: their first argument is the fields of a `Template` --------------------------

_template = functools.lru_cache(maxsize=8)(Template)


def ask(fields: tuple[Any, ...], what: str, *arguments: Any) -> Any:
    """Return an attribute of the template, or what its method returns."""
    asked = getattr(_template(*fields), what)
    return asked(*arguments) if arguments else asked


def write(fields: tuple[Any, ...], messages: list[Message], learnt: list[bool], tools: Any) -> list[dict[str, Any]]:
    """Return the fields of what `turns.write_learnt` returns, which JSON can write."""
    return [vars(one) for one in write_learnt(_template(*fields), messages, learnt, tools)]
