"""Tools of a request, as OpenAI's API has them, and the ones that may be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from meswitch_cli.engine.schema import MAX_DEPTH, deeper_than, unenforced
from meswitch_cli.server.errors import InvalidValueError
from meswitch_cli.server.messages import FUNCTION_NAME
from meswitch_cli.server.strict import JsonObject, Strict
from meswitch_cli.server.tools import Tool, ToolChoice
from meswitch_cli.server.tools.definitions import NO_PARAMETERS

_FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]


class Function(Strict):
    name: _FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = None

    @classmethod
    def of(cls, name: str, description: str | None, parameters: JsonObject | None, strict: bool | None) -> FunctionTool:
        """As another API has it."""
        function = Function(name=name, description=description, parameters=parameters, strict=strict)
        return cls(type="function", function=function)


class NamedFunction(Strict):
    name: _FunctionName


class NamedChoice(Strict):
    type: Literal["function"]
    function: NamedFunction

    @classmethod
    def of(cls, name: str) -> NamedChoice:
        """As another API has it."""
        return cls(type="function", function=NamedFunction(name=name))


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1)]


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def offered(tools: Sequence[FunctionTool]) -> list[Tool]:
    """The tools of a request.

    Raises:
        ApiError: two have one name, or a schema cannot be enforced.
    """
    result: list[Tool] = []
    for index, tool in enumerate(tools):
        function, name = tool.function, f"tools.{index}.function"
        if any(function.name == other.name for other in result):
            raise InvalidValueError(f"{name}.name", f"{name}.name: {function.name!r} is offered twice")
        schema = function.parameters or NO_PARAMETERS
        if deeper_than(schema, MAX_DEPTH):
            raise InvalidValueError(f"{name}.parameters", f"{name}.parameters: more than {MAX_DEPTH} levels")
        if function.strict and (keyword := unenforced(schema)):
            message = f"the schema's {keyword} cannot be enforced; leave it out, or the tool's strict"
            raise InvalidValueError(f"{name}.parameters", f"{name}.parameters: {message}")
        result.append(Tool(function.name, function.description, schema, bool(function.strict)))
    return result


def callable_tools(
    tools: Sequence[Tool], choice: ToolChoice | NamedChoice | AllowedChoice | None
) -> tuple[list[Tool], ToolChoice]:
    """Those of the offered tools that the model may call, and whether it must.

    Raises:
        ApiError: a tool is named that is not offered, or none is and one is asked for.
    """
    if not tools:
        if choice in (None, "none"):
            return [], "none"
        raise InvalidValueError("tool_choice", "tool_choice: there are no tools to choose from")
    if choice is None or isinstance(choice, str):
        return list(tools), choice or "auto"
    mode: ToolChoice = "required"
    if isinstance(choice, NamedChoice):
        named = [choice.function.name]
    else:
        named, mode = [tool.function.name for tool in choice.allowed_tools.tools], choice.allowed_tools.mode
    for name in named:
        if name not in [tool.name for tool in tools]:
            raise InvalidValueError("tool_choice", f"tool_choice: no tool {name!r} is offered")
    return [tool for tool in tools if tool.name in named], mode
