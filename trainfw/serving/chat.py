"""Conversations in OpenAI's form as prompts, by a model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

from trainfw.confined import Problem
from trainfw.data import ChatTemplate, Tokenizer
from trainfw.errors import short
from trainfw.serving.bodies import ApiError, Message, Tool
from trainfw.serving.text import TOOL_CALL
from trainfw.weights import PromptForm


class Chat:
    """Writer of prompts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._plain = ChatTemplate.usable(tokenizer)

    @property
    def there(self) -> bool:
        """Flag: there is a chat template."""
        return self._plain is not None

    @cached_property
    def _with_tools(self) -> ChatTemplate | None:
        return ChatTemplate.of(self._tokenizer, tools=True)

    @cached_property
    def reads_tool_calls(self) -> bool:
        """Flag: the template has a model write calls of tools in the form that `text.ToolCalls` reads."""
        source = "" if self._with_tools is None else self._with_tools.source
        return TOOL_CALL in source and "<function=" not in source

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool], system_prompt: str | None) -> list[int]:
        """Write a conversation up to the beginning of the assistant's turn, as ids.

        `system_prompt` stands before a conversation that has no system message.

        Raises ApiError 400 where there is no template, it refuses the conversation or leaves a message or the tools
        out, or a message holds a token that the template writes around messages.
        """
        template = self._with_tools if tools else self._plain
        if template is None:
            said = "the model has no chat template; use /v1/completions"
            raise ApiError(400, said, param="messages", code="no_chat_template")
        if system_prompt is not None and messages[0].role not in ("system", "developer"):
            messages = [Message(role="system", content=system_prompt), *messages]
        written = [self._message(template, message, i) for i, message in enumerate(messages)]
        given: list[object] | None = [tool.model_dump(exclude_none=True) for tool in tools] or None
        try:
            text = template.render(written, add_generation_prompt=True, tools=given)
            template.check_context(written, given)
            if given and template.render(written, add_generation_prompt=True) == text:
                raise ApiError(400, "tools: the chat template has no place for them", param="tools")
        except Problem as problem:
            raise ApiError(400, f"messages: {problem}", param="messages") from None
        return list(template.encode([text])[0].ids)

    def _message(self, template: ChatTemplate, message: Message, number: int) -> dict[str, object]:
        texts = [message.text, message.reasoning_content or ""]
        calls: list[dict[str, object]] = []
        for call in message.tool_calls:
            try:
                arguments = json.loads(call.function.arguments)
            except (ValueError, RecursionError):
                name = f"messages[{number}].tool_calls"
                raise ApiError(
                    400, f"{name}: arguments = {short(call.function.arguments)}: expected JSON", param=name
                ) from None
            calls.append({"type": "function", "id": call.id, "function": {"name": call.function.name}})
            calls[-1]["function"] = {"name": call.function.name, "arguments": arguments}
            texts.append(call.function.arguments)
        for text in texts:
            if found := template.marker_pattern.search(text):
                name = f"messages[{number}].content"
                said = f"{name}: holds {found[0]!r}, which the chat template writes around messages"
                raise ApiError(400, said, param=name)
        role: str = message.role
        if role == "developer" and "developer" not in template.source:
            role = "system"  # the older name of the same
        written: dict[str, object] = {"role": role, "content": message.text}
        extra = {
            "name": message.name, "tool_call_id": message.tool_call_id, "tool_calls": calls or None,
            "reasoning_content": message.reasoning_content,
        }  # fmt: skip
        return written | {key: value for key, value in extra.items() if value is not None}


def text_prompts(
    tokenizer: Tokenizer, form: PromptForm, given: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    """Return the prompts of a completion as ids: a text begins as `form` begins texts. Raises ApiError 400."""
    if isinstance(given, str):
        return [form.encode(tokenizer, given, chat=False)]
    prompts = [
        form.encode(tokenizer, one, chat=False) if isinstance(one, str) else one
        for one in given
        if not isinstance(one, int)
    ]
    prompts = prompts or [[one for one in given if isinstance(one, int)]]
    if not all(prompts):
        raise ApiError(400, "prompt: expected a text, or at least one token", param="prompt")
    return prompts
