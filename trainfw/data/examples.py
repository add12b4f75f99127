"""Examples: conversations, prompts and completions as tokens, with which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from trainfw.data.chat import ChatTemplate, Message, Span, TemplateProblem
from trainfw.data.config import DataConfig, Role
from trainfw.data.sources import Row, Unreadable
from trainfw.data.tokenizer import Tokenizer
from trainfw.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Example:
    """One example: `learnt[i]` says whether token i is to be predicted from those before it."""

    ids: list[int]
    learnt: list[bool]
    key: str
    """Decides its side: the prompt, or a chat's first user message."""


@dataclass(frozen=True)
class Refused:
    """Rows that could not be used, for one reason."""

    reason: str
    count: int
    first: str
    """Where the first of them is."""

    def __str__(self) -> str:
        return f"{self.count:,} row{'s' * (self.count > 1)}: {self.reason} (the first: {self.first})"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Refusals:
    """Counts refused rows by reason."""

    def __init__(self) -> None:
        self._by_reason: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, id_: str) -> None:
        count, first = self._by_reason.get(reason, (0, id_))
        self._by_reason[reason] = (count + 1, first)

    def summary(self) -> tuple[Refused, ...]:
        """The most frequent first."""
        found = [Refused(reason, *of) for reason, of in self._by_reason.items()]
        return tuple(sorted(found, key=lambda refused: -refused.count))


class _Unusable(Exception):
    """Why a row is refused."""


@dataclass(frozen=True)
class _Text:
    """A row as text: `spans` of it are learnt."""

    id: str
    text: str
    spans: list[Span]
    key: str


class Encoder:
    """Rows to examples, as `config` says."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.refusals = Refusals()
        self._template: ChatTemplate | None = None
        if config.format == "chat" or config.chat_template:
            self._template = ChatTemplate.of(tokenizer)
            if self._template is None:
                other = "" if config.format == "chat" else "set chat_template: false, or "
                raise UserError(
                    f"format: {config.format}: the tokenizer has no chat template; {other}put one beside its "
                    f"tokenizer.json: chat_template.jinja, or the key chat_template of tokenizer_config.json"
                )

    def encode(self, rows: Iterable[Row]) -> Iterator[Example]:
        """The examples of the rows that can be used; the others are counted in `refusals`."""
        texts = []
        for row in rows:
            try:
                texts.append(self._chat(row) if self.config.format == "chat" else self._pair(row))
            except (_Unusable, TemplateProblem) as problem:
                self.refusals.add(str(problem), row.id)
        encode = self._plain if self._template is None else self._written
        for one, (ids, learnt) in zip(texts, encode(texts), strict=True):
            try:
                yield self._fitted(ids, learnt, one.key)
            except _Unusable as problem:
                self.refusals.add(str(problem), one.id)

    # --- A row as text ------------------------------------------------------------------------------------------------

    def _chat(self, row: Row) -> _Text:
        config, value = self.config, _object(row.value)
        field = config.messages_field
        if field not in value:
            raise _Unusable(f"no {field!r}")
        messages = value[field]
        if not isinstance(messages, list) or not messages:
            raise _Unusable(f"{field!r} is not a list of messages")
        messages = [_message(message) for message in messages]
        tools = value.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise _Unusable("'tools' is not a list")
        if not any(message["role"] in config.loss_on for message in messages):
            raise _Unusable(f"no message of {' or '.join(config.loss_on)} to learn")
        if any(m["role"] in config.loss_on and not _content(m).strip() and "tool_calls" not in m for m in messages):
            raise _Unusable("a message to learn is empty")
        if config.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        said = next((_content(m) for m in messages if m["role"] == "user"), _content(messages[0]))
        return self._render(row.id, messages, tools, said)

    def _pair(self, row: Row) -> _Text:
        config, value = self.config, _object(row.value)
        texts = []
        for field in (config.prompt_field, config.completion_field):
            if field not in value:
                raise _Unusable(f"no {field!r}")
            if not isinstance(value[field], str):
                raise _Unusable(f"{field!r} is not text")
            texts.append(_unicode(value[field], repr(field)))
        prompt, completion = texts
        if not completion.strip():
            raise _Unusable(f"{config.completion_field!r} is empty")
        if self._template is None:
            return _Text(row.id, prompt + completion, [(len(prompt), len(prompt + completion))], prompt)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if config.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        return self._render(row.id, messages, None, prompt)

    def _render(self, id_: str, messages: list[Message], tools: list[Any] | None, key: str) -> _Text:
        assert self._template is not None
        for text in _strings([messages, tools]):
            _unicode(text, "a message")
            for special in self._template.special_tokens:
                if special in text:
                    raise _Unusable(f"a message holds {special!r}, which is a special token of the tokenizer")
        text = self._template.render(messages, tools=tools)
        spans = self._template.spans(text, messages, lambda m: m["role"] in self.config.loss_on, tools)
        return _Text(id_, text, spans, key)

    # --- Text as tokens -----------------------------------------------------------------------------------------------

    def _plain(self, texts: Sequence[_Text]) -> Iterator[tuple[list[int], list[bool]]]:
        """bos, prompt, completion and eos: encoded apart, so that the prompt's tokens are those of generation."""
        cut = [one.spans[0][0] for one in texts]
        prompts = self.tokenizer.encode_batch([one.text[:at] for one, at in zip(texts, cut)])
        completions = self.tokenizer.encode_batch([one.text[at:] for one, at in zip(texts, cut)])
        for prompt, completion in zip(prompts, completions):
            ids = [self.tokenizer.bos_id, *prompt, *completion, self.tokenizer.eos_id]
            yield ids, [i > len(prompt) for i in range(len(ids))]

    def _written(self, texts: Sequence[_Text]) -> Iterator[tuple[list[int], list[bool]]]:
        assert self._template is not None
        special = set(self._template.special_tokens.values())
        for one, encoding in zip(texts, self._template.encode([one.text for one in texts])):
            ids, learnt = encoding.ids, [False] * len(encoding.ids)
            for start, end in one.spans:
                inside = [i for i, place in enumerate(encoding.offsets) if place[1] > start and place[0] < end]
                # What follows the token that ends the turn is not for the model to write.
                while any(ids[i] in special for i in inside) and ids[inside[-1]] not in special:
                    inside.pop()
                for i in inside:
                    learnt[i] = True
            yield ids, learnt

    def _fitted(self, ids: list[int], learnt: list[bool], key: str) -> Example:
        """Whole up to the last token learnt, after which nothing would be."""
        if learnt:
            learnt[0] = False  # nothing comes before it
        if True not in learnt:
            raise _Unusable("nothing to learn")
        end = len(learnt) - learnt[::-1].index(True)
        # The last token is predicted, and never an input.
        room = self.config.sequence_length + 1
        if end > room and (self.config.too_long == "refuse" or True not in learnt[:room]):
            raise _Unusable(f"longer than sequence_length = {self.config.sequence_length}")
        end = min(end, room)
        end -= learnt[:end][::-1].index(True)
        return Example(ids[:end], learnt[:end], key)


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, Unreadable):
        raise _Unusable(value.reason)
    if not isinstance(value, dict):
        raise _Unusable("not an object")
    return value


def _message(message: Any) -> Message:
    """The message without its nulls, which Parquet fills absent keys with and templates would print."""
    if not isinstance(message, dict):
        raise _Unusable("a message is not an object")
    message = {key: value for key, value in message.items() if value is not None}
    roles = get_args(Role)
    role = message.get("role")
    if not isinstance(role, str):
        raise _Unusable("a message has no role")
    if role not in roles:
        raise _Unusable(f"unknown role {role[:40]!r}{did_you_mean(role, roles)}")
    if not isinstance(message.get("content", "" if "tool_calls" in message else None), str):
        raise _Unusable("a message's content is not text")
    return message


def _content(message: Message) -> str:
    return message.get("content", "")


def _unicode(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{what} has a lone surrogate") from None
    return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
