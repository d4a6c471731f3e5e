"""What a request to Anthropic's `/v1/messages` may hold, and the chat that it asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from meswitch_cli.engine.sampling_ranges import MAX_STOPS
from meswitch_cli.server.errors import InvalidValueError
from meswitch_cli.server.messages import (
    FUNCTION_NAME,
    MAX_CALLS,
    AssistantMessage,
    CalledFunction,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    as_text,
)
from meswitch_cli.server.schemas import ChatRequest, JsonSchema, Label, ResponseFormat, chat_request, in_range
from meswitch_cli.server.strict import JsonObject, Strict
from meswitch_cli.server.tool_schemas import FunctionTool, NamedChoice
from meswitch_cli.server.tools import ToolChoice

_CacheControl = dict[str, Any] | None
_Id = Annotated[str, Field(min_length=1, max_length=256)]


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: _CacheControl = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: _Id
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    input: JsonObject
    cache_control: _CacheControl = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: _Id
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: _CacheControl = None


_Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(Strict):
    role: Literal["user", "assistant"]
    content: str | list[_Block]


class AnthropicTool(Strict):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: _CacheControl = None


class AnthropicChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(pattern=FUNCTION_NAME)] | None = None
    disable_parallel_tool_use: bool | None = None


class UserMetadata(Strict):
    user_id: Label | None = None


class Disabled(Strict):
    type: Literal["disabled"]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Strict):
    format: OutputFormat | None = None


class CountRequest(Strict):
    """A conversation whose tokens are counted; `MessagesRequest` is one that is answered."""

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=1024)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_CALLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Disabled | None = None
    cache_control: _CacheControl = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    def chat(self, **sampling: Any) -> ChatRequest:
        """The same as a chat completion, with this sampling. Raises ApiError for what contradicts itself."""
        messages = self._messages()
        return chat_request(
            model=self.model,
            messages=messages,
            continue_final_message=isinstance(messages[-1], AssistantMessage) or None,
            tools=[
                FunctionTool.of(tool.name, tool.description, tool.input_schema, tool.strict)
                for tool in self.tools or ()
            ],
            tool_choice=self._choice(),
            parallel_tool_calls=not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            response_format=self._format(),
            **sampling,
        )

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        if self.system:
            messages.append(SystemMessage(role="system", content=as_text(self.system)))
        for number, message in enumerate(self.messages):
            messages += _as_openai(message, f"messages.{number}")
        return messages

    def _choice(self) -> ToolChoice | NamedChoice | None:
        choice = self.tool_choice
        if choice is None:
            return None
        if (choice.type == "tool") != (choice.name is not None):
            raise InvalidValueError("tool_choice.name", 'tool_choice.name: goes with type "tool", and with no other')
        if choice.name is not None:
            return NamedChoice.of(choice.name)
        if not self.tools and choice.type == "auto":
            return None
        return "required" if choice.type == "any" else "none" if choice.type == "none" else "auto"

    def _format(self) -> ResponseFormat | None:
        wanted = self.output_format or (self.output_config.format if self.output_config else None)
        if wanted is None:
            return None
        return ResponseFormat(type="json_schema", json_schema=JsonSchema.model_validate({"schema": wanted.schema_}))


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, in_range("max_tokens")]
    temperature: Annotated[float, in_range("temperature")] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    top_k: Annotated[int, in_range("top_k")] | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MAX_STOPS)] | None
    ) = None
    stream: bool | None = None
    metadata: UserMetadata | None = None
    service_tier: Label | None = None

    def generation(self) -> ChatRequest:
        """The chat, with what says how it is answered."""
        return self.chat(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
            user=self.metadata.user_id if self.metadata else None,
            service_tier=self.service_tier,
        )


def _as_openai(message: AnthropicMessage, name: str) -> list[Message]:
    """A message's blocks: results of tools are messages of their own, before what the user says beside them."""
    blocks = message.content
    if isinstance(blocks, str):
        blocks = [TextBlock(type="text", text=blocks)]
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    if (calls and message.role == "user") or (results and message.role == "assistant"):
        raise InvalidValueError(f"{name}.content", f"{name}.content: the assistant uses tools, the user tells results")
    if message.role == "assistant":
        if not (texts or calls):
            raise InvalidValueError(f"{name}.content", f"{name}.content: is empty")
        said, called = as_text(texts) or None, _calls(calls) or None
        return [AssistantMessage(role="assistant", content=said, tool_calls=called)]
    told: list[Message] = [
        ToolMessage(role="tool", content=as_text(block.content or ""), tool_call_id=block.tool_use_id)
        for block in results
    ]
    return [*told, UserMessage(role="user", content=as_text(texts))] if texts or not told else told


def _calls(blocks: Sequence[ToolUseBlock]) -> list[ToolCall]:
    return [
        ToolCall(
            id=block.id,
            function=CalledFunction(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)),
        )
        for block in blocks
    ]
