"""What every schema of a request shares: a member that is not named is refused, unless it asks for nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from meswitch_cli.server.errors import NOT_SUPPORTED

#: Values of a member in NOT_SUPPORTED that ask for nothing, whichever it is.
_EMPTY: tuple[Any, ...] = ([], {})


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


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("it holds something that JSON text cannot") from error
    return value


#: An object of any members, which can be written as JSON.
JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]


def missing_member(name: str) -> PydanticCustomError:
    """The error of a member that is needed because of the others."""
    return PydanticCustomError("missing_member", "a member is missing", {"member": name})
