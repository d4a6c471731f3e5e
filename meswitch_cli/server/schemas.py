"""What requests may hold. A member that is not here is refused by name, unless it asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from meswitch_cli.engine.contract import Sampling
from meswitch_cli.engine.sampling_ranges import MAX_STOPS, RANGES
from meswitch_cli.server.errors import NOT_SUPPORTED, ApiError, InvalidValueError

MAX_LOGIT_BIASES = 1024
MAX_COMPLETION_LOGPROBS = 5

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]

#: Messages in the form of chat templates, and what a router reads: those, or a text.
Conversation = list[dict[str, str]]
Subject = str | Conversation
#: Values of a member in NOT_SUPPORTED that ask for nothing, whichever it is.
_EMPTY: tuple[Any, ...] = ([], {})


def _in_range(name: str) -> Any:
    """The range of a member of `Sampling`."""
    low, high, above = RANGES[name]
    return Field(gt=low, le=high) if above else Field(ge=low, le=high)


class Strict(BaseModel):
    """Every member is named, of its own type, and finite; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_members_that_ask_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if not (_is_text(list(data)) and all(_is_text(value) for value in data.values())):
            raise PydanticCustomError("not_text", "half of a surrogate pair is no text")
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: value
            for name, value in data.items()
            if value is not None  # libraries send it for what their users have not set
            and (name in known or name not in NOT_SUPPORTED or value not in (*_EMPTY, *NOT_SUPPORTED[name]))
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """As pydantic describes it, and what is left out before it looks."""
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        described["additionalProperties"] = {"type": "null"}
        for name, member in described["properties"].items():
            if name not in described.get("required", ()) and {"type": "null"} not in member.get("anyOf", ()):
                described["properties"][name] = {"anyOf": [member, {"type": "null"}]}
        return schema


def _is_text(value: Any) -> bool:
    """Whether strings, and those in a list, can be written as UTF-8: JSON's escapes can say what is no character."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, list) or all(_is_text(item) for item in value)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Annotated[str, Field(max_length=256)] | None = None


def for_template(messages: Sequence[Message]) -> Conversation:
    """As router and chat templates expect them; `developer` is what OpenAI now calls the system's role."""
    conversation = []
    for message in messages:
        text = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
        plain = {"role": "system" if message.role == "developer" else message.role, "content": text}
        conversation.append(plain if message.name is None else plain | {"name": message.name})
    return conversation


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_text(self) -> JsonSchema:
        try:
            json.dumps(self.schema_, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError("the schema holds something that JSON text cannot") from error
        return self


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationParameters(Strict):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(max_length=256)]
    temperature: Annotated[float, _in_range("temperature")] | None = None
    top_p: Annotated[float, _in_range("top_p")] | None = None
    top_k: Annotated[int, _in_range("top_k")] | None = None
    min_p: Annotated[float, _in_range("min_p")] | None = None
    repetition_penalty: Annotated[float, _in_range("repetition_penalty")] | None = None
    frequency_penalty: Annotated[float, _in_range("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, _in_range("presence_penalty")] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, _in_range("logit_bias")]],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    min_tokens: Annotated[int, _in_range("min_tokens")] | None = None
    max_tokens: Annotated[int, _in_range("max_tokens")] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    def choices(self, limit: int) -> int:
        """`n`, checked against the server's limit; refuses options of a stream where nothing is streamed."""
        if (self.n or 1) > limit:
            raise InvalidValueError("n", f"n: at most {limit} on this server")
        if self.stream_options is not None and not self.stream:
            raise InvalidValueError("stream_options", "stream_options: allowed only with stream: true")
        return self.n or 1

    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def common_sampling(self, max_tokens: int) -> dict[str, Any]:
        """The members of `Sampling` that both kinds of request set in the same way."""
        if (self.min_tokens or 0) > max_tokens:
            message = f"min_tokens: {self.min_tokens} is more than the {max_tokens} tokens that may be generated"
            raise InvalidValueError("min_tokens", message)
        plain = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*plain, "presence_penalty", "min_tokens", "ignore_eos")}
        return {name: value for name, value in given.items() if value is not None} | {
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "seed": self.seed,
            "max_tokens": max_tokens,
        }


class ChatRequest(GenerationParameters):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, _in_range("max_tokens")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, _in_range("logprobs")] | None = None
    response_format: ResponseFormat | None = None

    def token_limit(self) -> int | None:
        """The most tokens a choice may have; None: as many as the context holds."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens is max_completion_tokens by its old name: give one of them"
            raise InvalidValueError("max_tokens", message)
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def sampling(self, max_tokens: int) -> Sampling:
        """As the engine takes it. Raises ApiError for members that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidValueError("top_logprobs", "top_logprobs: allowed only with logprobs: true")
        wanted = self.response_format
        schema = wanted.json_schema.schema_ if wanted and wanted.json_schema else None
        if wanted and (wanted.type == "json_schema") != (schema is not None):
            message = 'response_format: "json_schema" goes with type "json_schema", and with no other'
            raise InvalidValueError("response_format.json_schema", message)
        return Sampling(
            **self.common_sampling(max_tokens),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=schema,
            json_object=wanted is not None and wanted.type == "json_object",
        )


class CompletionRequest(GenerationParameters):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    def prompts(self, limit: int) -> list[str] | list[list[int]]:
        """One text, or one list of token ids, a prompt."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        if len(given) > limit:
            raise InvalidValueError("prompt", f"prompt: at most {limit} prompts in one request on this server")
        return list(given)

    def sampling(self, max_tokens: int) -> Sampling:
        """As the engine takes it. Raises ApiError for members that cannot be honoured together."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            message = "best_of: only as many as n; rank the choices by their logprobs instead"
            raise ApiError(400, message, code="unsupported_parameter", parameter="best_of")
        if self.echo and self.logprobs is not None:
            message = "echo: not with logprobs, since the prompt's own are not computed"
            raise ApiError(400, message, code="unsupported_parameter", parameter="echo")
        return Sampling(**self.common_sampling(max_tokens), logprobs=self.logprobs)


class RouteRequest(Strict):
    """What the router is asked about: messages or a prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    prompt: str | None = None

    def subject(self) -> Subject:
        if (self.messages is None) == (self.prompt is None):
            raise InvalidValueError("messages", "give messages or prompt, one of them")
        return for_template(self.messages) if self.messages else self.prompt or ""


class TokenizeRequest(Strict):
    model: Annotated[str, Field(max_length=256)]
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(Strict):
    model: Annotated[str, Field(max_length=256)]
    tokens: list[TokenId]
    skip_special_tokens: bool = False


class LoadRequest(Strict):
    """An expert to serve: `path` is its folder below the server's --experts-dir, its name unless given."""

    name: str
    path: Annotated[str, Field(min_length=1, max_length=1024)] | None = None


class UnloadRequest(Strict):
    name: str


class PinRequest(Strict):
    name: str
    pinned: bool = True
