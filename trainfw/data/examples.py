"""Examples: conversations, or prompts and completions, as tokens with a flag for each that is learnt."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainfw.data import messages as checks
from trainfw.data.chat import ChatTemplate, stop_ids
from trainfw.data.config import DataConfig
from trainfw.data.sources import Row
from trainfw.data.tokenizer import Tokenizer
from trainfw.data.turns import Message, Span, TemplateProblem, Written
from trainfw.errors import UserError


@dataclass(frozen=True)
class Example:
    """One example: `learnt[i]` is True where token i is to be predicted from those before it."""

    ids: list[int]
    learnt: list[bool]
    key: str
    """Text that decides its split: the prompt, or a chat's first user message."""
    cut: bool = False
    """Flag: it ends at the row's end rather than at that of a turn."""


@dataclass(frozen=True)
class Refused:
    """Rows that could not be used, for one reason."""

    reason: str
    count: int
    first: str
    """Place of the first of them."""

    def __str__(self) -> str:
        return f"{self.count:,} row{'s' * (self.count > 1)}: {self.reason} (the first: {self.first})"


class Refusals:
    """Counts of refused rows by reason."""

    def __init__(self) -> None:
        self._by_reason: dict[str, tuple[int, str, str]] = {}

    def add(self, reason: str, id_: str) -> None:
        """Count the row `id_` once, though it is added several times in turn where it makes several examples."""
        count, first, last = self._by_reason.get(reason, (0, id_, ""))
        self._by_reason[reason] = (count + (id_ != last), first, id_)

    def summary(self) -> tuple[Refused, ...]:
        """Return the counts, the largest first."""
        counts = [Refused(reason, count, first) for reason, (count, first, _) in self._by_reason.items()]
        return tuple(sorted(counts, key=lambda refused: -refused.count))


@dataclass(frozen=True)
class Text:
    """A row as text, of which `spans` are learnt."""

    id: str
    text: str
    spans: list[Span]
    key: str

    @classmethod
    def joined(cls, id_: str, prompt: str, completion: str) -> Text:
        return cls(id_, prompt + completion, [(len(prompt), len(prompt + completion))], prompt)


@dataclass(frozen=True)
class Conversation:
    """A row that the template is to write."""

    id: str
    messages: list[Message]
    learnt: list[bool]
    tools: list[Any] | None
    key: str


class Encoder:
    """Encoder of rows as examples."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.refusals = Refusals()
        self._unread: Counter[str] = Counter()
        self._unmet: Counter[str] = Counter()
        self._rows_apart = self._cut = self._untagged = self._straddling = self._turns = self._stopping = 0
        self._stops = stop_ids(tokenizer)
        self._template = ChatTemplate.of(tokenizer, config.date) if config.writes_turns else None
        self._with_tools = ChatTemplate.of(tokenizer, config.date, tools=True) if config.writes_turns else None
        if self._with_tools == self._template:
            self._with_tools = self._template  # what is known of one is known of both
        if config.writes_turns and self._template is None:
            other = "" if config.format == "chat" else "set chat_template: false, or "
            raise UserError(
                f"format: {config.format}: the tokenizer has no chat template; {other}put one beside its "
                f"tokenizer.json: chat_template.jinja, or the key chat_template of tokenizer_config.json"
            )

    def encode(self, rows: Iterable[Row]) -> Iterator[Example]:
        """Yield the examples of the rows that can be used; `refusals` counts the others."""
        usable: list[Text | Conversation] = []
        for row in rows:
            try:
                usable.append(self._chat(row) if self.config.format == "chat" else self._pair(row))
            except checks.Unusable as problem:
                self.refusals.add(str(problem), row.id)
        texts: list[Text] = []
        for one, written in zip(usable, self._as_texts(usable), strict=True):
            if isinstance(written, TemplateProblem):
                self.refusals.add(str(written), one.id)
            else:
                self._rows_apart += len(written) > 1
                texts += written
        for text, (ids, learnt) in zip(texts, self._as_tokens(texts), strict=True):
            try:
                yield self._counted(self._fitted(ids, learnt, text.key))
            except checks.Unusable as problem:
                self.refusals.add(str(problem), text.id)

    def remarks(self) -> tuple[str, ...]:
        """Describe, in lines for whoever trains on them, what is odd about the examples encoded so far."""
        lines = []
        if self._turns and not self._stopping:
            stops = ", ".join(repr(self.tokenizer.backend.id_to_token(id_)) for id_ in self._stops)
            tagged = self._template is not None and self._template.has_generation_tags
            advice = "write it within the {% generation %} tags, or " if tagged else ""
            lines.append(
                f"warning: no turn to learn ends in a token at which generation stops ({stops}): the model will not "
                f"learn to stop; {advice}end the assistant's turns with {{{{ eos_token }}}} in the chat template, or "
                "name what ends them as eos_token_id in generation_config.json"
            )
        for prompt, count in self._unmet.most_common(1):
            lines.append(
                f"warning: {_plural(count, 'turn')} to learn without the beginning {prompt!r}, with which the chat "
                "template asks for one: the model will be asked for what it did not learn"
            )
        if self._straddling:
            lines.append(
                f"warning: {_plural(self._straddling, 'turn')} to learn beginning within a token of the prompt's end: "
                "the model will be asked with other tokens than it learnt from"
            )
        if self._untagged:
            turns = _plural(self._untagged, "turn")
            lines.append(f"{turns} of the assistant outside the template's {{% generation %}} tags: not learnt")
        if self._cut:
            length = f"sequence_length = {self.config.sequence_length}"
            lines.append(f"{_plural(self._cut, 'example')} cut at {length}, before the end of a turn")
        if self._rows_apart:
            lines.append(
                f"several examples of {_plural(self._rows_apart, 'row')}, since the chat template writes a turn "
                "differently once others follow: each turn is learnt as the model will write it"
            )
        if self._unread:
            keys = ", ".join(f"{key} ({count:,})" for key, count in self._unread.most_common(8))
            lead = "warning: " if checks.MEANINGFUL & set(self._unread) else ""
            lines.append(f"{lead}the chat template reads nothing of these keys of messages and rows: {keys}")
        return tuple(lines)

    def _chat(self, row: Row) -> Conversation:
        config, value = self.config, checks.checked_row(row.value)
        field = config.messages_field
        messages = value.get(field)
        if not isinstance(messages, list) or not messages:
            raise checks.Unusable(f"{field!r} is not a list of messages" if field in value else f"no {field!r}")
        messages = [*checks.system_beside(value), *(checks.checked_message(message) for message in messages)]
        learnt = [checks.is_learnt(message, config.loss_on) for message in messages]
        tools = checks.tools_beside(value)
        checks.check_something_learnt(messages, learnt, config.loss_on)
        return self._conversation(row.id, *checks.begun(messages, learnt, config.system_prompt), tools)

    def _pair(self, row: Row) -> Text | Conversation:
        config, value = self.config, checks.checked_row(row.value)
        for field in (config.prompt_field, config.completion_field):
            if field not in value:
                raise checks.Unusable(f"no {field!r}")
            if isinstance(value[field], list):
                raise checks.Unusable(f"{field!r} is a list: put both into one of messages, for format: chat")
            if not isinstance(value[field], str):
                raise checks.Unusable(f"{field!r} is not text")
            checks.check_text(value[field], repr(field))
        prompt, completion = value[config.prompt_field], value[config.completion_field]
        if not completion.strip():
            raise checks.Unusable(f"{config.completion_field!r} is empty")
        if self._template is None:
            return Text.joined(row.id, prompt, completion)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return self._conversation(row.id, *checks.begun(messages, [False, True], config.system_prompt), None)

    def _conversation(
        self, id_: str, messages: list[Message], learnt: list[bool], key: str, tools: list[object] | None
    ) -> Conversation:
        template = self._template_of(tools)
        try:
            for text in checks.strings_in([messages, tools]):
                checks.check_text(text, "a message")
                if marker := template.marker_pattern.search(text):
                    is_special = marker[0] in self.tokenizer.special_tokens
                    why = "is a special token of the tokenizer" if is_special else "marks turns in the chat template"
                    raise checks.Unusable(f"a message holds {marker[0]!r}, which {why}")
        except RecursionError:
            raise checks.Unusable("a message is nested too deeply") from None
        return Conversation(id_, messages, learnt, tools, key)

    def _template_of(self, tools: list[object] | None) -> ChatTemplate:
        template = self._with_tools if tools else self._template
        assert template is not None
        return template

    def _as_texts(self, rows: Sequence[Text | Conversation]) -> list[list[Text] | TemplateProblem]:
        """Return the texts of each row, or the reason why the template does not write it.

        Each template (with and without tools) gets one request for all of its conversations.
        """
        texts: list[list[Text] | TemplateProblem] = [[one] if isinstance(one, Text) else [] for one in rows]
        conversations = [(i, one) for i, one in enumerate(rows) if isinstance(one, Conversation)]
        for with_tools in (False, True):
            batch = [(i, one) for i, one in conversations if bool(one.tools) == with_tools]
            if batch:
                requests = [(one.messages, one.learnt, one.tools) for _, one in batch]
                answers = self._template_of(batch[0][1].tools).write_learnt(requests)
                for (i, one), answer in zip(batch, answers, strict=True):
                    texts[i] = answer if isinstance(answer, TemplateProblem) else self._texts(one, answer)
        return texts

    def _texts(self, row: Conversation, written: list[Written]) -> list[Text]:
        self._untagged += sum(one.untagged for one in written)
        self._unmet.update(prompt for one in written for prompt in one.unmet)
        keys = [key for message in row.messages for key, value in message.items() if value not in ([], {}, "")]
        keys += ["tools"] * bool(row.tools)
        source = self._template_of(row.tools).source
        self._unread.update(key for key in keys if key not in source)
        return [Text(row.id, one.text, one.spans, row.key) for one in written]

    def _as_tokens(self, texts: Sequence[Text]) -> Iterator[tuple[list[int], list[bool]]]:
        if self._template is None:
            # Prompt and completion are encoded apart, so that generation gives a prompt the same tokens.
            cut = [one.spans[0][0] for one in texts]
            prompts = self.tokenizer.encode_batch([one.text[:at] for one, at in zip(texts, cut)])
            completions = self.tokenizer.encode_batch([one.text[at:] for one, at in zip(texts, cut)])
            for prompt, completion in zip(prompts, completions):
                ids = [self.tokenizer.bos_id, *prompt, *completion, self.tokenizer.eos_id]
                yield ids, [i > len(prompt) for i in range(len(ids))]
            return
        for one, encoding in zip(texts, self._template.encode([one.text for one in texts])):
            ids, learnt = encoding.ids, [False] * len(encoding.ids)
            starts, ends = ([place[side] for place in encoding.offsets] for side in (0, 1))
            ordered = starts == sorted(starts) and ends == sorted(ends)
            for start, end in one.spans:
                inside: Sequence[int] = range(bisect.bisect_right(ends, start), bisect.bisect_left(starts, end))
                if not ordered:  # else a search: looking at all places for each of very many turns takes too long
                    inside = [i for i in range(len(starts)) if ends[i] > start and starts[i] < end]
                self._straddling += bool(inside) and starts[inside[0]] < start
                for i in inside:
                    learnt[i] = True
            yield ids, learnt

    def _fitted(self, ids: list[int], learnt: list[bool], key: str) -> Example:
        """Return the example up to its last learnt token, cut where it is too long. Raises Unusable."""
        if learnt:
            learnt[0] = False  # nothing comes before it
        if True not in learnt:
            raise checks.Unusable("nothing to learn")
        end = len(learnt) - learnt[::-1].index(True)
        # The last token is predicted, and never an input.
        room = self.config.sequence_length + 1
        if end > room and (self.config.too_long == "refuse" or True not in learnt[:room]):
            raise checks.Unusable(f"longer than sequence_length = {self.config.sequence_length}")
        kept = min(end, room)
        kept -= learnt[:kept][::-1].index(True)
        return Example(ids[:kept], learnt[:kept], key, cut=end > room)

    def _counted(self, one: Example) -> Example:
        """Count, for `remarks`, an example that is used, and return it."""
        self._cut += one.cut
        turns_end = [i for i, learnt in enumerate(one.learnt) if learnt and not any(one.learnt[i + 1 : i + 2])]
        self._turns += len(turns_end)
        self._stopping += sum(one.ids[i] in self._stops for i in turns_end)
        return one


def _plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"
