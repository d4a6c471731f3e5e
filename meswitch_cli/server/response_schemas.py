"""What a request to `/v1/responses` may hold, and the chat that it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from meswitch_cli.server.messages import (
    FUNCTION_NAME,
    MAX_CALLS,
    Arguments,
    AssistantMessage,
    CalledFunction,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    as_text,
)
from meswitch_cli.server.schemas import ChatRequest, Hints, JsonSchema, Label, ResponseFormat, chat_request, in_range
from meswitch_cli.server.strict import JsonObject, Strict
from meswitch_cli.server.tool_schemas import AllowedChoice, AllowedTools, FunctionTool, NamedChoice
from meswitch_cli.server.tools import ToolChoice

_FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]
_Status = Literal["in_progress", "completed", "incomplete"]


class ContentPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    id: Label | None = None
    status: _Status | None = None
    phase: Label | None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: _FunctionName
    arguments: Arguments
    id: Label | None = None
    status: _Status | None = None


class CallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    output: str | list[ContentPart]
    id: Label | None = None
    status: _Status | None = None


class ResponseTool(Strict):
    type: Literal["function"]
    name: _FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ResponseNamed(Strict):
    type: Literal["function"]
    name: _FunctionName


class ResponseAllowed(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamed], Field(min_length=1)]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] = False


class ResponseRequest(Hints):
    """A turn. Nothing is stored, so that `previous_response_id` has nothing to go on with."""

    model: Annotated[str, Field(max_length=256)]
    input: str | Annotated[list[MessageItem | CallItem | CallOutputItem], Field(min_length=1, max_length=1024)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, in_range("max_tokens")] | None = None
    temperature: Annotated[float, in_range("temperature")] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_CALLS)] | None = None
    tool_choice: ToolChoice | ResponseNamed | ResponseAllowed | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None  # there is no reasoning to include
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    user: Label | None = None

    def chat(self) -> ChatRequest:
        """The same as a chat completion. Raises ApiError for what contradicts itself."""
        return chat_request(
            model=self.model,
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=self._format(),
            tools=[
                FunctionTool.of(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools or ()
            ],
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            stream=self.stream,
            user=self.user,
            verbosity=self.text.verbosity if self.text else None,
            **{name: getattr(self, name) for name in Hints.model_fields},
        )

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        if self.instructions:
            messages.append(SystemMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*messages, UserMessage(role="user", content=self.input)]
        for item in self.input:
            if isinstance(item, CallItem):
                function = CalledFunction(name=item.name, arguments=item.arguments)
                call = ToolCall(id=item.call_id, function=function)
                last = messages[-1] if messages else None
                if isinstance(last, AssistantMessage):  # what a turn says and calls is one message of a template
                    last.tool_calls = [*(last.tool_calls or ()), call]
                else:
                    messages.append(AssistantMessage(role="assistant", tool_calls=[call]))
            elif isinstance(item, CallOutputItem):
                messages.append(ToolMessage(role="tool", content=as_text(item.output), tool_call_id=item.call_id))
            elif item.role == "user":
                messages.append(UserMessage(role="user", content=as_text(item.content)))
            elif item.role == "assistant":
                messages.append(AssistantMessage(role="assistant", content=as_text(item.content)))
            else:
                messages.append(SystemMessage(role=item.role, content=as_text(item.content)))
        return messages

    def _format(self) -> ResponseFormat | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        schema = wanted.schema_
        described = None if schema is None else JsonSchema.model_validate({"name": wanted.name, "schema": schema})
        return ResponseFormat(type=wanted.type, json_schema=described)

    def _choice(self) -> ToolChoice | NamedChoice | AllowedChoice | None:
        choice = self.tool_choice
        if isinstance(choice, ResponseNamed):
            return NamedChoice.of(choice.name)
        if isinstance(choice, ResponseAllowed):
            allowed = AllowedTools(mode=choice.mode, tools=[NamedChoice.of(tool.name) for tool in choice.tools])
            return AllowedChoice(type="allowed_tools", allowed_tools=allowed)
        return choice if self.tools else None
