"""Conversations with calls in them, as a model's chat template takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from meswitch_cli.server.tools.definitions import Tool
from meswitch_cli.server.tools.syntax import CallSyntax

#: A message as chat templates have it; of calls, the arguments are objects.
Message = dict[str, Any]


def for_syntax(
    conversation: Sequence[Message], tools: Sequence[Tool], syntax: CallSyntax
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages that a template is given, and the tools, None where it takes none."""
    if not syntax.taught:
        return _told(conversation, tools, syntax), None
    names: dict[str, str] = {}
    messages = []
    for message in conversation:
        changed = dict(message)
        if calls := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in calls}
            changed["tool_calls"] = [call | {"id": _id_for(syntax, call["id"])} for call in calls]
        if message["role"] == "tool":
            changed.setdefault("name", names.get(message["tool_call_id"], ""))
            changed["tool_call_id"] = _id_for(syntax, message["tool_call_id"])
        messages.append(changed)
    return messages, [tool.for_template() for tool in tools] or None


def _id_for(syntax: CallSyntax, given: str) -> str:
    """A call's id, which Mistral's templates accept only with nine letters and digits."""
    if syntax.name != "mistral" or (len(given) == 9 and given.isascii() and given.isalnum()):
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:9]


def _told(conversation: Sequence[Message], tools: Sequence[Tool], syntax: CallSyntax) -> list[Message]:
    """Calls and results as texts of assistant and user, tools in a system message."""
    messages: list[Message] = []
    answering = False
    for message in conversation:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if answering:
                messages[-1]["content"] += f"\n{text}"
            else:
                messages.append({"role": "user", "content": text})
            answering = True
            continue
        answering = False
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls := message.get("tool_calls"):
            written = syntax.between.join(_written(call["function"], syntax) for call in calls)
            plain["content"] = "\n".join(part for part in (message["content"], written) if part)
        messages.append(plain)
    if not tools:
        return messages
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{_instruction(tools, syntax)}"
    else:
        messages.insert(0, {"role": "system", "content": _instruction(tools, syntax)})
    return messages


def _written(function: dict[str, Any], syntax: CallSyntax) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{syntax.head_of(function['name'])}{arguments}{syntax.tail}"


def _instruction(tools: Sequence[Tool], syntax: CallSyntax) -> str:
    listed = "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools)
    form = f"{syntax.head_of('NAME OF THE FUNCTION')}{{ARGUMENTS}}{syntax.tail}"
    return (
        "You can call these functions, each given with the JSON schema of its parameters:\n"
        f"<tools>\n{listed}\n</tools>\n"
        f"To call one, write this, with its arguments as a JSON object:\n{form}\n"
        "The results come back between <tool_response> and </tool_response>. "
        "Where no function helps, answer in plain words."
    )
