"""Bodies of requests in OpenAI's form: every field is honoured, refused by name, or changes nothing."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainfw.errors import UserError, did_you_mean, short
from trainfw.json_text import parse_json
from trainfw.sampling import ALTERNATIVES

Json: TypeAlias = dict[str, object]

MOST_CHOICES = 64
"""Answers that one request may ask for: prompts times `n`."""
_MOST_STOPS, _LONGEST_STOP, _MOST_MESSAGES = 16, 256, 2048

IGNORED = {
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    "service_tier",
}
"""Fields that OpenAI knows and that change no answer."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    "logit_bias": ({},),
    "store": (False,),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "moderation"), ()),
}
"""Fields that OpenAI knows and that are not honoured here, and the values that ask for nothing."""


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status in (401, 429):
            kind = {401: "authentication_error", 429: "rate_limit_error"}[self.status]
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """A body, or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Text(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Text] = ""
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Function(Body):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json = {}
    strict: Literal[False] = False


class Tool(Body):
    type: Literal["function"]
    function: Function


class Schema(Body):
    name: str = ""
    description: str = ""
    schema_: Annotated[Json, Field(alias="schema")] = {}
    strict: bool = True


class Form(Body):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: Schema | None = None
    regex: str | None = None

    def given(self) -> tuple[str, object] | None:
        """Return the kind of the form, json_schema or regex, and the form; None for any text."""
        for name, value in (("json_schema", self.json_schema), ("regex", self.regex)):
            if (value is not None) != (name == self.type):
                raise ApiError(400, f"response_format: {name} goes with type {name!r} alone", param="response_format")
        if self.type in ("text", "regex"):
            return None if self.regex is None else ("regex", self.regex)
        return "json_schema", {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class Asked(Body):
    """Fields that both kinds of completions have."""

    model: str
    n: Annotated[int, Field(ge=1, le=16)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: Form | None = None

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, stop: str | list[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > _MOST_STOPS or not all(0 < len(one) <= _LONGEST_STOP for one in stops):
            raise ValueError(f"expected at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters")
        return stops

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens to tell of each token; None: no probabilities."""
        raise NotImplementedError


class ChatAsked(Asked):
    """The body of a chat completion."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=ALTERNATIVES)] | None = None
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"

    @property
    def most_tokens(self) -> int | None:
        given = {one for one in (self.max_tokens, self.max_completion_tokens) if one is not None}
        if len(given) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens: differ; give one", param="max_completion_tokens")
        return given.pop() if given else None

    @property
    def alternatives(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: goes with logprobs = true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsked(Asked):
    """The body of a completion."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=ALTERNATIVES)] | None = None

    @property
    def most_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class LoadAdapter(Body):
    """The body of vLLM's `/v1/load_lora_adapter`."""

    lora_name: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,128}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapter(Body):
    """The body of vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


B = TypeVar("B", bound=Body)


def parse(kind: type[B], data: bytes) -> B:
    """Parse a body. Raises ApiError 400, which names the field."""
    try:
        given = _without_nulls(parse_json(data, "body"))
    except UserError as error:
        raise ApiError(400, str(error)) from None
    if issubclass(kind, Asked):
        for name in IGNORED & given.keys():
            del given[name]
        for name in NEUTRAL.keys() & given.keys():
            value = given.pop(name)
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
                neutral = "".join(f", or give {one!r}" for one in NEUTRAL[name][:1])
                raise ApiError(
                    400, f"{name} = {short(value)}: is not supported; leave it out{neutral}", param=name,
                    code="unsupported_parameter",
                )  # fmt: skip
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refused(kind, error) from None


def _without_nulls(value: object) -> Json:
    """Leave out the fields that are null, which say nothing, at the top and in messages."""
    assert isinstance(value, dict)
    given = {key: each for key, each in value.items() if each is not None}
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [
            {key: each for key, each in one.items() if each is not None} if isinstance(one, dict) else one
            for one in messages
        ]
    return given


def _refused(kind: type[Body], error: ValidationError) -> ApiError:
    """Word the first of Pydantic's errors; of a field that may be one of several types, the one furthest inside."""
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    types = r"str|int|list\[.*"  # by which Pydantic names the alternatives
    place = [part for part in first["loc"] if isinstance(part, int) or not re.fullmatch(types, part)]
    name = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in place))
    value = short(first["input"], 60)
    if first["type"] == "extra_forbidden":
        where, _, field = name.rpartition(".")
        known = kind.model_fields if not where else ()
        text, code = f"{name}: is not a field that is known here{did_you_mean(field, known)}", "unknown_parameter"
    elif first["type"] == "missing":
        text, code = f"{name}: is missing", "missing_required_parameter"
    else:
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
        text, code = f"{name} = {value}: expected {message}", "invalid_value"
    return ApiError(400, text, param=name, code=code)
