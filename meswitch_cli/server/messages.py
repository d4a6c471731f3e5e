"""Messages of a conversation, as OpenAI's API has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field, model_validator

from meswitch_cli.server.strict import Strict, missing_member

#: Messages in the form of chat templates, and what a router reads: those, or a text.
Conversation = list[dict[str, Any]]
Subject = str | Conversation

#: Names of functions: OpenAI's letters, and those that servers of tools put into names beside them.
FUNCTION_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"
MAX_CALLS = 128

_Name = Annotated[str, Field(max_length=256)]


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # whatever is shared is shared anyway


Text = str | list[TextPart]


class HasText(Protocol):
    """A part of a content that has text, in any API."""

    text: str


def as_text(content: str | Sequence[HasText]) -> Text:
    """A content of another API's parts."""
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Text
    name: _Name | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Text
    name: _Name | None = None


def _is_object(text: str) -> str:
    try:
        if isinstance(json.loads(text or "{}"), dict):
            return text
    except (ValueError, RecursionError):
        pass
    raise ValueError("must be the JSON text of an object")


#: Arguments of a call; none may be written as an empty text.
Arguments = Annotated[str, AfterValidator(_is_object)]


class CalledFunction(Strict):
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: Arguments = ""


class ToolCall(Strict):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # a stream's parts have one, and libraries keep it


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Text | None = None
    name: _Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None

    @model_validator(mode="after")
    def _says_or_calls(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise missing_member("content")
        return self


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Text
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: _Name | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


def for_template(messages: Sequence[Message]) -> Conversation:
    """As router and chat templates expect them; `developer` is what OpenAI now calls the system's role."""
    return [_plain(message) for message in messages]


def _plain(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")},
            }
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def text_of(content: Text | None) -> str:
    """The text of a content, empty where there is none."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())
