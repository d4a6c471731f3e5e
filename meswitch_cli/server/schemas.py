"""What requests may hold. A member that is not here is refused by name, unless it asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from meswitch_cli.engine.contract import Sampling
from meswitch_cli.engine.sampling_ranges import MAX_STOPS, RANGES
from meswitch_cli.server.errors import ApiError, InvalidValueError
from meswitch_cli.server.messages import MAX_CALLS, Messages, Subject, for_template, text_of
from meswitch_cli.server.strict import JsonObject, Strict
from meswitch_cli.server.tool_schemas import AllowedChoice, FunctionTool, NamedChoice
from meswitch_cli.server.tools import ToolChoice

MAX_LOGIT_BIASES = 1024
MAX_COMPLETION_LOGPROBS = 5

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]

#: Of a dictionary that a client attaches to its request, as OpenAI's API limits it.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Label = Annotated[str, Field(max_length=256)]


def in_range(name: str) -> Any:
    """The range of a member of `Sampling`."""
    low, high, above = RANGES[name]
    return Field(gt=low, le=high) if above else Field(ge=low, le=high)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str | None = None
    schema_: Annotated[JsonObject, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Hints(Strict):
    """Members of a request that change no token, in each API under the same names; the log has them."""

    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None


class GenerationParameters(Hints):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(max_length=256)]
    temperature: Annotated[float, in_range("temperature")] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    top_k: Annotated[int, in_range("top_k")] | None = None
    min_p: Annotated[float, in_range("min_p")] | None = None
    repetition_penalty: Annotated[float, in_range("repetition_penalty")] | None = None
    frequency_penalty: Annotated[float, in_range("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, in_range("presence_penalty")] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, in_range("logit_bias")]],
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
    min_tokens: Annotated[int, in_range("min_tokens")] | None = None
    max_tokens: Annotated[int, in_range("max_tokens")] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: Label | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

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

    def continuous_usage(self) -> bool:
        """Whether each part of a stream tells the usage so far."""
        return self.include_usage() and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def hints(self) -> dict[str, Any] | None:
        """What was said that changes no token, for the log."""
        names = (*Hints.model_fields, "verbosity")
        return {name: value for name in names if (value := getattr(self, name)) is not None} or None

    def common_sampling(self, max_tokens: int, defaults: Mapping[str, float]) -> dict[str, Any]:
        """The members of `Sampling` that both kinds of request set in the same way.

        `defaults` are the model's own, for what the request leaves open.
        """
        if (self.min_tokens or 0) > max_tokens:
            message = f"min_tokens: {self.min_tokens} is more than the {max_tokens} tokens that may be generated"
            raise InvalidValueError("min_tokens", message)
        plain = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*plain, "presence_penalty", "min_tokens", "ignore_eos")}
        return (
            dict(defaults)
            | {name: value for name, value in given.items() if value is not None}
            | {
                "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
                "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                "stop_token_ids": tuple(self.stop_token_ids or ()),
                "seed": self.seed,
                "max_tokens": max_tokens,
            }
        )


class ChatRequest(GenerationParameters):
    messages: Messages
    max_completion_tokens: Annotated[int, in_range("max_tokens")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, in_range("logprobs")] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_CALLS)] | None = None
    tool_choice: ToolChoice | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def continues(self) -> bool:
        """Whether the answer goes on with the last message, an assistant's."""
        if self.continue_final_message:
            if self.add_generation_prompt:
                message = "continue_final_message: not with add_generation_prompt, which begins a new message"
                raise InvalidValueError("continue_final_message", message)
            if self.messages[-1].role != "assistant" or not text_of(self.messages[-1].content):
                message = "continue_final_message: the last message must be the assistant's, and have text"
                raise InvalidValueError("continue_final_message", message)
        return bool(self.continue_final_message)

    def token_limit(self) -> int | None:
        """The most tokens a choice may have; None: as many as the context holds."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens is max_completion_tokens by its old name: give one of them"
            raise InvalidValueError("max_tokens", message)
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema that an answer in words must satisfy. Raises ApiError for a format without its schema."""
        wanted = self.response_format
        schema = wanted.json_schema.schema_ if wanted and wanted.json_schema else None
        if wanted and (wanted.type == "json_schema") != (schema is not None):
            message = 'response_format: "json_schema" goes with type "json_schema", and with no other'
            raise InvalidValueError("response_format.json_schema", message)
        return {"type": "object"} if wanted and wanted.type == "json_object" else schema

    def sampling(self, max_tokens: int, defaults: Mapping[str, float] = MappingProxyType({})) -> Sampling:
        """As the engine takes it, tools apart. Raises ApiError for members that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidValueError("top_logprobs", "top_logprobs: allowed only with logprobs: true")
        schema = self.schema_of_text()
        json_object = self.response_format is not None and self.response_format.type == "json_object"
        return Sampling(
            **self.common_sampling(max_tokens, defaults),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=None if json_object else schema,
            json_object=json_object,
        )


#: A text or several, or their token ids.
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)


def listed(given: Prompts, limit: int, name: str) -> list[str | list[int]]:
    """One text, or one list of token ids, a prompt.

    Raises:
        ApiError: there are more of them than the limit; `name` is their parameter.
    """
    several: Any = given
    if isinstance(several, str) or isinstance(several[0], int):
        return [several]
    if len(several) > limit:
        raise InvalidValueError(name, f"{name}: at most {limit} prompts in one request on this server")
    return list(several)


def chat_request(**members: Any) -> ChatRequest:
    """The chat that a request of another API asks for, member by member checked already.

    Raises:
        ApiError: together they are more than a chat may hold.
    """
    try:
        return ChatRequest(**members)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or None
        raise InvalidValueError(name, f"{name}: {first['msg']}") from error


class CompletionRequest(GenerationParameters):
    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    def sampling(self, max_tokens: int, defaults: Mapping[str, float] = MappingProxyType({})) -> Sampling:
        """As the engine takes it. Raises ApiError for members that cannot be honoured together."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            message = "best_of: only as many as n; rank the choices by their logprobs instead"
            raise ApiError(400, message, code="unsupported_parameter", parameter="best_of")
        scores = self.logprobs if self.echo else None
        return Sampling(**self.common_sampling(max_tokens, defaults), logprobs=self.logprobs, prompt_logprobs=scores)


class RouteRequest(Strict):
    """What the router is asked about: messages or a prompt."""

    messages: Messages | None = None
    prompt: str | None = None

    def subject(self) -> Subject:
        if (self.messages is None) == (self.prompt is None):
            raise InvalidValueError("messages", "give messages or prompt, one of them")
        return for_template(self.messages) if self.messages else self.prompt or ""


class TokenizeRequest(Strict):
    model: Annotated[str, Field(max_length=256)]
    prompt: str | None = None
    messages: Messages | None = None
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


class LoadAdapterRequest(Strict):
    """As `LoadRequest`, in vLLM's words; `base_model_name` says nothing here, since there is one base."""

    lora_name: str
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    load_inplace: Literal[False] = False
    base_model_name: str | None = None


class UnloadAdapterRequest(Strict):
    """As `UnloadRequest`, in vLLM's words; its number of an adapter says nothing here."""

    lora_name: str
    lora_int_id: int | None = None


class EmbeddingsRequest(Strict):
    """Texts to embed; `layer` is the decoder layer whose states are averaged, the middle one unless given."""

    model: Annotated[str, Field(max_length=256)]
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    layer: Annotated[int, Field(ge=1)] | None = None
    user: Label | None = None
