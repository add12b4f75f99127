"""Checks of rows and their messages, and the reasons for which they are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from trainfw.data.config import Role
from trainfw.data.readers import Unreadable
from trainfw.data.sources import CONVERSATION, ROW_SWITCHES
from trainfw.data.turns import Message
from trainfw.errors import did_you_mean


class Unusable(Exception):
    """Reason, in words, for which a row is refused."""


def checked_row(value: Any) -> dict[str, Any]:
    """Return a row that is an object and asks for no weight of its own. Raises Unusable for any other."""
    if isinstance(value, Unreadable):
        raise Unusable(value.reason)
    if not isinstance(value, dict):
        raise Unusable("not an object")
    for key in ROW_SWITCHES:
        weight = value.get(key)
        if weight not in (None, 1):
            raise Unusable(f"the row says {key}: {json.dumps(weight)[:20]}")
    return value


def checked_message(message: object) -> Message:
    """Return the message without nulls, which Parquet writes for absent keys and templates would print.

    Raises Unusable for a message that templates do not take.
    """
    if not isinstance(message, dict):
        raise Unusable("a message is not an object")
    message = {key: value for key, value in message.items() if value is not None}
    roles = get_args(Role)
    role = message.get("role")
    if role is None and {"from", "value"} <= set(message):
        raise Unusable("a message has 'from' and 'value' (ShareGPT's form): write it with 'role' and 'content'")
    if not isinstance(role, str):
        raise Unusable("a message has no role")
    if role not in roles:
        raise Unusable(f"unknown role {role[:40]!r}{did_you_mean(role, roles)}")
    if "function_call" in message:
        raise Unusable("a message has 'function_call', which is now written as 'tool_calls'")
    content = message.get("content", "" if "tool_calls" in message else None)
    if not isinstance(content, str):
        kind = "a list of parts: write their text as one" if isinstance(content, list) else "not text"
        raise Unusable(f"a message's content is {kind}")
    return message


def system_beside(row: dict[str, object]) -> list[Message]:
    """Return a system message that stands beside the others, as Anthropic and Bedrock write it."""
    for key in CONVERSATION[2:]:
        if row.get(key):
            raise Unusable(f"{key!r} beside the messages is not read, and may change what the template writes")
    if not isinstance(system := row.get("system"), str | None):
        raise Unusable("'system' is not text")
    return [{"role": "system", "content": system}] if system else []


def tools_beside(row: dict[str, object]) -> list[object] | None:
    """Return the tools that stand beside the messages, None where there are none."""
    if not isinstance(tools := row.get("tools"), list | None):
        raise Unusable("'tools' is not a list")
    return tools


def begun(
    messages: list[Message], learnt: list[bool], system_prompt: str | None
) -> tuple[list[Message], list[bool], str]:
    """Return a conversation and its flags after `system_prompt`, unless it has a system message of its own; and the
    text that decides its split, the first user message's."""
    if system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
        messages, learnt = [{"role": "system", "content": system_prompt}, *messages], [False, *learnt]
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return messages, learnt, first.get("content", "")


_SWITCHES = ("weight", "train", "training", "loss")
"""Keys that mark a message as learnt or not: OpenAI's fine-tuning format, Axolotl (two keys) and ms-swift."""
MEANINGFUL = {
    *("tools", "tool_calls", "reasoning_content", "reasoning", "thinking"),
    *("loss_weight", "loss_mask", "mask", "masked", "trainable", "train_detail", "training_detail"),
}
"""Keys that hold part of a conversation, or mark what of it is to be learnt; other keys only describe it."""


def is_learnt(message: Message, roles: Sequence[str]) -> bool:
    """Tell whether a message is to be learnt, and take the keys that mark it out of it: no template is to see them."""
    learnt = message["role"] in roles
    for key in _SWITCHES:
        if key not in message:
            continue
        value = message.pop(key)
        if value not in (0, 1):
            raise Unusable(f"a message's {key} is {repr(value)[:20]}: expected 0 or 1, or false or true")
        if value is True and message["role"] not in roles:
            raise Unusable(f"a message of {message['role']} says {key}: true, but loss_on is {', '.join(roles)}")
        learnt = learnt and bool(value)
    return learnt


def check_something_learnt(messages: Sequence[Message], learnt: Sequence[bool], roles: Sequence[str]) -> None:
    """Raise Unusable where no message is to be learnt, or one that holds neither text nor calls of tools."""
    if not any(learnt):
        raise Unusable(f"no message of {' or '.join(roles)} to learn")
    for message, flag in zip(messages, learnt):
        if flag and not message.get("content", "").strip() and not message.get("tool_calls"):
            raise Unusable("a message to learn is empty")


def check_text(text: str, name: str) -> None:
    """Raise Unusable where UTF-8 cannot write the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(f"{name} has a lone surrogate") from None


def strings_in(value: object) -> Iterator[str]:
    """Yield every text in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)
