"""What tools a request offers, and which of them may or must be called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: `required`: at least one of them is called.
ToolChoice = Literal["auto", "none", "required"]

#: What a tool takes that names no parameters.
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object.
        strict: the schema is enforced or refused; otherwise as much of it is enforced as can be.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = {"name": self.name, "description": self.description or "", "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
