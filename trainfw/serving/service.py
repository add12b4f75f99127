"""OpenAI's completions over an engine, and vLLM's two routes for adapters."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, TypeVar, TypeVarTuple

import anyio
from anyio import to_thread

from trainfw.data import Tokenizer, stop_ids
from trainfw.errors import UserError, did_you_mean
from trainfw.serving.bodies import (
    MOST_CHOICES,
    ApiError,
    Asked,
    ChatAsked,
    Json,
    LoadAdapter,
    TextAsked,
    UnloadAdapter,
)
from trainfw.serving.chat import Chat, text_prompts
from trainfw.serving.choices import Choice, Choices, Piece, chat_logprobs, text_logprobs
from trainfw.serving.grammar import Grammars
from trainfw.serving.metrics import Metrics
from trainfw.serving.requests import Engine, Full, Sampling, Unavailable
from trainfw.serving.text import AnswerText, ToolCalls
from trainfw.weights import PromptForm, prompt_form

Events: TypeAlias = AsyncIterator[Json]
"""Events of a stream, in the order in which they are sent."""
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def in_thread(do: Callable[[*Ts], T], *arguments: *Ts, limiter: anyio.CapacityLimiter | None = None) -> T:
    """Call a function in another thread. What is wrong with a request is raised without the frames of that thread.

    Through them it would hold itself, and with it the request, until Python next collects garbage of long life.
    """
    try:
        return await to_thread.run_sync(do, *arguments, limiter=limiter)
    except (ApiError, UserError, Full) as error:
        raise error.with_traceback(None) from None


@dataclass
class Service:
    """An engine as requests need it: with its tokenizer, and the names under which models are asked for."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    """Name of the model itself."""
    forms: dict[str | None, PromptForm]
    """Form of prompts, of each adapter and (None) of the model."""
    adapter_dirs: Sequence[Path] = ()
    """Directories from which adapters may be loaded over HTTP."""

    def __post_init__(self) -> None:
        self.chat = Chat(self.tokenizer)
        self.ends = frozenset(stop_ids(self.tokenizer))
        self.metrics = Metrics(self.engine)
        self._created = int(time.time())
        self._preparing, self._loading = anyio.CapacityLimiter(8), anyio.CapacityLimiter(1)

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest text that a slot could hold, if every token were the longest one."""
        return self.engine.length * max(map(len, self.tokenizer.backend.get_vocab()))

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.engine.vocabulary, self.ends)

    # --- Models and adapters ------------------------------------------------------------------------------------------

    def models(self) -> Json:
        return {"object": "list", "data": [self.model(name) for name in (self.name, *self.engine.adapters)]}

    def model(self, name: str) -> Json:
        """Describe a model. Raises ApiError 404."""
        adapter = self._adapter(name)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "trainfw",
            "parent": None if adapter is None else self.name,
            "max_model_len": self.engine.length,
            "chat": self.chat.there,
        }

    def _adapter(self, name: str) -> str | None:
        if name == self.name:
            return None
        if name in self.engine.adapters:
            return name
        known = [self.name, *self.engine.adapters]
        raise ApiError(
            404, f"model: no {name[:80]!r}{did_you_mean(name[:80], known)}", param="model", code="model_not_found"
        )

    async def load_adapter(self, asked: LoadAdapter) -> str:
        """Load an adapter from below one of `adapter_dirs`. Raises ApiError, and UserError where it does not fit."""
        name, path = asked.lora_name, str(await in_thread(self._confined, asked.lora_path))

        def load() -> None:
            if name in (self.name, *self.engine.adapters):
                raise ApiError(400, f"lora_name: {name!r} is there already", param="lora_name")
            self.forms[name] = prompt_form(path)
            try:
                self.engine.add_adapter(name, path)
            except BaseException:
                del self.forms[name]
                raise

        await in_thread(load, limiter=self._loading)
        return f"Success: LoRA adapter '{name}' added successfully."

    def _confined(self, given: str) -> Path:
        """Find the directory that a request names. Raises ApiError for one that is not below `adapter_dirs`."""
        if not self.adapter_dirs:
            raise ApiError(403, "lora_path: the server was started without --adapter-dir", param="lora_path")
        for directory in self.adapter_dirs:
            try:
                root = directory.resolve(strict=True)
                path = (root / given).resolve(strict=True)  # what is absolute replaces the root; links are followed
            except (OSError, ValueError, RuntimeError):
                continue
            if path.is_dir() and path.is_relative_to(root):
                return path
        # The same words for what is not there and what is elsewhere: nobody learns what the machine holds.
        raise ApiError(400, "lora_path: no such directory below those of --adapter-dir", param="lora_path")

    async def unload_adapter(self, asked: UnloadAdapter) -> str:
        name = asked.lora_name
        if name not in self.engine.adapters:
            raise ApiError(404, f"lora_name: no {name[:80]!r}", param="lora_name", code="model_not_found")
        await in_thread(self.engine.remove_adapter, name, limiter=self._loading)
        self.forms.pop(name, None)
        return f"Success: LoRA adapter '{name}' removed successfully."

    # --- Completions --------------------------------------------------------------------------------------------------

    async def begin(self, asked: ChatAsked | TextAsked, choices: Choices) -> None:
        """Ask the engine for the answers. Raises ApiError."""
        try:
            await in_thread(self._begin, asked, choices, limiter=self._preparing)
        except Full:
            raise ApiError(429, "the queue is full; try again", code="queue_full") from None
        except Unavailable as error:
            raise ApiError(503, str(error)) from None
        except UserError as error:
            self._adapter(asked.model)  # gone since it was looked up: 404, as if it had not been there
            field = str(error).split(" ")[0].rstrip(":")
            raise ApiError(400, str(error), param=field if field in type(asked).model_fields else None) from None

    def _begin(self, asked: ChatAsked | TextAsked, choices: Choices) -> None:
        adapter = self._adapter(asked.model)
        self._check_sizes(asked)
        form = self.forms.get(adapter, PromptForm())
        tools = asked.tools if isinstance(asked, ChatAsked) and asked.tool_choice == "auto" else []
        wanted = None if asked.response_format is None else asked.response_format.given()
        if wanted is not None and tools:
            raise ApiError(400, "response_format: goes with no tools", param="response_format")
        if isinstance(asked, ChatAsked):
            prompts = [self.chat.prompt(asked.messages, tools, form.system_prompt)]
        else:
            prompts = text_prompts(self.tokenizer, form, asked.prompt)
        if len(prompts) * asked.n > MOST_CHOICES:
            raise ApiError(400, f"n = {asked.n}: expected {MOST_CHOICES} answers in all at most", param="n")
        for prompt in prompts:
            room = self.engine.length - len(prompt)
            if room < (asked.most_tokens or 1):
                raise ApiError(
                    400,
                    f"a prompt of {len(prompt):,} tokens and an answer of {asked.most_tokens or 1:,} are more than the "
                    f"{self.engine.length:,} that the server holds",
                    code="context_length_exceeded",
                )
            sampling = Sampling(
                max_tokens=room if asked.most_tokens is None else asked.most_tokens,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=None if asked.top_p == 1 else asked.top_p,
                logprobs=asked.alternatives,
                stop_ids=self.ends,
                adapter=adapter,
            )
            choices.prompt_tokens += len(prompt)
            for i in range(asked.n):
                constraint = None if wanted is None else self.grammars.constraint(*wanted)
                seed = None if asked.seed is None else (asked.seed + i) % 2**32
                answer = self.engine.submit(prompt, replace(sampling, seed=seed, constraint=constraint))
                choices.all.append(
                    Choice(
                        len(choices.all),
                        answer,
                        AnswerText(self.tokenizer, asked.stop),
                        choices.began,
                        calls=ToolCalls() if tools and self.chat.reads_tool_calls else None,
                        constraint=constraint,
                    )
                )

    def _check_sizes(self, asked: ChatAsked | TextAsked) -> None:
        """Refuse texts that no slot holds before they are encoded, which takes far more memory. Raises ApiError."""
        if isinstance(asked, ChatAsked):
            size = sum(len(message.text) for message in asked.messages)
        else:
            texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
            size = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if size > self._longest:
            raise ApiError(
                400,
                f"a prompt of {size:,} characters is more than the {self.engine.length:,} tokens that the server holds",
                code="context_length_exceeded",
            )

    async def answer(self, asked: ChatAsked | TextAsked, choices: Choices) -> Json:
        """Wait for the answers that were begun, and return them in OpenAI's form."""
        whole = [Piece("", []) for _ in choices.all]
        async for choice, piece in choices.pieces():
            got = whole[choice.index]
            got.text += piece.text
            got.tokens += piece.tokens
            got.calls, got.finish = piece.calls, piece.finish
        written = self._chat_choice if isinstance(asked, ChatAsked) else self._text_choice
        found = [written(i, piece, asked.alternatives is not None) for i, piece in enumerate(whole)]
        return self._head(asked) | {"choices": found, "usage": choices.usage()}

    async def events(self, asked: ChatAsked | TextAsked, choices: Choices) -> Events:
        """Return the answers that were begun as events, each as soon as it is there."""
        chat, usage = isinstance(asked, ChatAsked), asked.stream_options.include_usage
        head = self._head(asked, ".chunk" if chat else "") | ({"usage": None} if usage else {})
        if chat:
            for choice in choices.all:
                yield head | {"choices": [_delta(choice.index, {"role": "assistant", "content": ""})]}
        logprobs = asked.alternatives is not None
        async for choice, piece in choices.pieces():
            if not chat:
                yield head | {"choices": [self._text_choice(choice.index, piece, logprobs)]}
                continue
            if piece.text or (logprobs and piece.tokens):
                one = _delta(choice.index, {"content": piece.text})
                if logprobs:
                    one["logprobs"] = chat_logprobs(self.tokenizer, piece.tokens)
                yield head | {"choices": [one]}
            if piece.calls:
                calls = [call | {"index": i} for i, call in enumerate(_tool_calls(piece.calls))]
                yield head | {"choices": [_delta(choice.index, {"tool_calls": calls})]}
            if piece.finish is not None:
                yield head | {"choices": [_delta(choice.index, {}) | {"finish_reason": piece.finish}]}
        if usage:
            yield head | {"choices": [], "usage": choices.usage()}

    def _head(self, asked: Asked, suffix: str = "") -> Json:
        kind, short = ("chat.completion", "chatcmpl") if isinstance(asked, ChatAsked) else ("text_completion", "cmpl")
        return {
            "id": f"{short}-{uuid.uuid4().hex}",
            "object": kind + suffix,
            "created": int(time.time()),
            "model": asked.model,
        }

    def _chat_choice(self, index: int, piece: Piece, logprobs: bool) -> Json:
        message: Json = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message |= {"content": piece.text.strip() or None, "tool_calls": _tool_calls(piece.calls)}
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.tokenizer, piece.tokens) if logprobs else None,
            "finish_reason": piece.finish,
        }

    def _text_choice(self, index: int, piece: Piece, logprobs: bool) -> Json:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": text_logprobs(self.tokenizer, piece.tokens) if logprobs else None,
            "finish_reason": piece.finish,
        }


def _delta(index: int, delta: Mapping[str, object]) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _tool_calls(calls: Sequence[tuple[str, str]]) -> list[Json]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for name, arguments in calls
    ]


def sse(event: Json | str) -> bytes:
    """Write an event of a stream."""
    return f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n".encode()
