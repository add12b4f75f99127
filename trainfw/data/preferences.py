"""Preferences: pairs of answers to one prompt, the chosen and the rejected, as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from trainfw.data import messages as checks
from trainfw.data.examples import Conversation, Encoder, Example, Text
from trainfw.data.sources import CONVERSATION, Row
from trainfw.data.turns import Message, TemplateProblem

_LEARNT = ("assistant",)


class PairEncoder(Encoder):
    """Encoder of rows as pairs: two examples each, the chosen one first."""

    def encode(self, rows: Iterable[Row]) -> Iterator[Example]:
        """Yield the sides of the rows that can be used; a row with a side that cannot is counted once."""
        sides: list[Text | Conversation] = []
        for row in rows:
            try:
                sides += self._sides(row)
            except checks.Unusable as problem:
                self.refusals.add(str(problem), row.id)
        texts: list[Text] = []
        written = self._as_texts(sides)
        for i in range(0, len(sides), 2):
            try:
                texts += [_only(one) for one in written[i : i + 2]]
            except checks.Unusable as problem:
                self.refusals.add(str(problem), sides[i].id)
        tokens = list(self._as_tokens(texts))
        for i in range(0, len(texts), 2):
            try:
                chosen, rejected = (self._fitted(*tokens[j], texts[j].key) for j in (i, i + 1))
                if chosen.ids == rejected.ids:  # spaces that the template strips, or what was cut
                    raise checks.Unusable("both sides are the same as tokens")
            except checks.Unusable as problem:
                self.refusals.add(str(problem), texts[i].id)
            else:
                yield self._counted(chosen)
                yield self._counted(rejected)

    @property
    def _fields(self) -> tuple[str, str]:
        return self.config.chosen_field, self.config.rejected_field

    def _sides(self, row: Row) -> Sequence[Text | Conversation]:
        value = checks.checked_row(row.value)
        for field in self._fields:
            if value.get(field) is None:
                raise checks.Unusable(f"no {field!r}")
            if not isinstance(value[field], str | list):
                raise checks.Unusable(f"{field!r} is neither text nor a list of messages")
        sides = [value[field] for field in self._fields]
        if type(sides[0]) is not type(sides[1]):
            raise checks.Unusable("of {!r} and {!r}, one is text and the other a list".format(*self._fields))
        return (self._of_texts if isinstance(sides[0], str) else self._of_messages)(row.id, value, *sides)

    def _check_differ(self, chosen: object, rejected: object) -> None:
        if chosen == rejected:
            raise checks.Unusable("{!r} and {!r} are equal".format(*self._fields))

    def _of_texts(self, id_: str, row: dict[str, object], *sides: str) -> Sequence[Text | Conversation]:
        field = self.config.prompt_field
        prompt = row.get(field)
        if not isinstance(prompt, str):
            raise checks.Unusable(
                f"no {field!r}" if prompt is None else f"{field!r} is not text, as {self._fields[0]!r} is"
            )
        for name, text in zip((field, *self._fields), (prompt, *sides)):
            checks.check_text(text, repr(name))
            if not text.strip() and name != field:
                raise checks.Unusable(f"{name!r} is empty")
        self._check_differ(*sides)
        if self._template is None:
            if keys := [key for key in CONVERSATION if row.get(key)]:
                raise checks.Unusable(f"{keys[0]!r} beside the texts, which is for a chat template to write")
            return [Text.joined(id_, prompt, side) for side in sides]
        turns = [[{"role": "assistant", "content": side}] for side in sides]
        return self._conversations(id_, row, [{"role": "user", "content": prompt}], zip(turns, [[True], [True]]))

    def _of_messages(self, id_: str, row: dict[str, object], *answers: list[object]) -> Sequence[Conversation]:
        if self._template is None:
            raise checks.Unusable(
                f"{self._fields[0]!r} is a list of messages, which `chat_template: false` does not write"
            )
        sides = [[checks.checked_message(message) for message in answer] for answer in answers]
        learnt = [[checks.is_learnt(message, _LEARNT) for message in side] for side in sides]
        self._check_differ(*sides)
        prompt = self._prompt(row)
        if not prompt:
            pairs = enumerate(zip(*sides))
            shared = next((i for i, (one, other) in pairs if one != other), min(map(len, sides)))
            prompt = sides[0][:shared]
            sides, learnt = [side[shared:] for side in sides], [flags[shared:] for flags in learnt]
        if not prompt:
            names = "{!r} and {!r}".format(*self._fields)
            raise checks.Unusable(f"no {self.config.prompt_field!r}, and {names} begin with no message in common")
        for field, side, flags in zip(self._fields, sides, learnt):
            if not side:
                raise checks.Unusable(f"{field!r} holds no message after the prompt")
            for does, role in (("begins", side[0]["role"]), ("ends", side[-1]["role"])):
                if role != "assistant":
                    raise checks.Unusable(
                        f"{field!r}, after the prompt, {does} with a message of {role}, not of assistant"
                    )
            checks.check_something_learnt(side, flags, _LEARNT)
        return self._conversations(id_, row, prompt, zip(sides, learnt))

    def _prompt(self, row: dict[str, object]) -> list[Message]:
        field = self.config.prompt_field
        prompt = row.get(field)
        if prompt is None:
            return []
        if not isinstance(prompt, list) or not prompt:
            advice = "" if prompt == [] else "; where these are whole conversations, name another prompt_field"
            raise checks.Unusable(f"{field!r} is not a list of messages, as {self._fields[0]!r} is{advice}")
        messages = [checks.checked_message(message) for message in prompt]
        for message in messages:
            checks.is_learnt(message, _LEARNT)  # takes its marks out of it: nothing of a prompt is learnt
        return messages

    def _conversations(
        self, id_: str, row: dict[str, object], prompt: list[Message], sides: Iterable[tuple[list[Message], list[bool]]]
    ) -> Sequence[Conversation]:
        prompt = [*checks.system_beside(row), *prompt]
        prompt, unlearnt, key = checks.begun(prompt, [False] * len(prompt), self.config.system_prompt)
        tools = checks.tools_beside(row)
        return [self._conversation(id_, [*prompt, *side], [*unlearnt, *flags], key, tools) for side, flags in sides]


def _only(written: list[Text] | TemplateProblem) -> Text:
    if isinstance(written, TemplateProblem):
        raise checks.Unusable(str(written))
    if len(written) > 1:
        why = "since the chat template writes a turn differently once others follow"
        raise checks.Unusable(f"several examples of one side, {why}")
    return written[0]
