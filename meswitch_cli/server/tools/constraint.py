"""The grammar of an answer that may or must hold calls, in xgrammar's language of structural tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meswitch_cli.server.tools.definitions import Tool, ToolChoice
from meswitch_cli.server.tools.syntax import CallSyntax


def structural_tag(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    several: bool = True,
    text: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an answer may be.

    `several` is whether more than one call may be made, `text` the JSON schema of an answer without calls, None where
    that is free. The calls' names and arguments are the tools' own, whatever else the answer holds.
    """
    several = several and syntax.several
    if choice == "none" or not tools:
        kept: dict[str, Any] = {"type": "any_text", "excludes": [syntax.trigger]}
        return _whole(kept if text is None else _json(text))
    if choice == "required":
        return _whole(_calls(syntax, tools, several))
    if text is not None:
        return _whole({"type": "or", "elements": [_calls(syntax, tools, several), _json(text)]})
    if syntax.after:
        listed = _separated(syntax, tools, several)
        tags = [{"type": "tag", "begin": syntax.before, "content": listed, "end": syntax.after}]
    else:
        tags = [_call(syntax, tool) for tool in tools]
    once = bool(syntax.after) or not several
    return _whole({"type": "triggered_tags", "triggers": [syntax.trigger], "tags": tags, "stop_after_first": once})


def _calls(syntax: CallSyntax, tools: Sequence[Tool], several: bool) -> dict[str, Any]:
    """Calls and nothing else, one at least."""
    parts = [_constant(syntax.before), _separated(syntax, tools, several), _constant(syntax.after)]
    return {"type": "sequence", "elements": [part for part in parts if part is not None]}


def _separated(syntax: CallSyntax, tools: Sequence[Tool], several: bool) -> dict[str, Any]:
    return {
        "type": "tags_with_separator",
        "tags": [_call(syntax, tool) for tool in tools],
        "separator": syntax.between,
        "at_least_one": True,
        "stop_after_first": not several,
    }


def _call(syntax: CallSyntax, tool: Tool) -> dict[str, Any]:
    return {"type": "tag", "begin": syntax.head_of(tool.name), "content": _json(tool.parameters), "end": syntax.tail}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    # A structural tag cannot ask for no whitespace at all.
    return {"type": "json_schema", "json_schema": dict(schema), "max_whitespace_cnt": 1}


def _constant(text: str) -> dict[str, Any] | None:
    return {"type": "const_string", "value": text} if text else None


def _whole(form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}
