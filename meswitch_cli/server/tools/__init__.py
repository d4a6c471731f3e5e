"""Calls of tools: what a request offers, how a model writes a call, and reading it back out of the answer."""

from meswitch_cli.server.tools.constraint import structural_tag
from meswitch_cli.server.tools.conversation import for_syntax
from meswitch_cli.server.tools.definitions import Tool, ToolChoice
from meswitch_cli.server.tools.parser import AnswerPart, CallParser, CallPart
from meswitch_cli.server.tools.syntax import CallSyntax, syntax_of

__all__ = [
    "AnswerPart",
    "CallParser",
    "CallPart",
    "CallSyntax",
    "Tool",
    "ToolChoice",
    "for_syntax",
    "structural_tag",
    "syntax_of",
]
