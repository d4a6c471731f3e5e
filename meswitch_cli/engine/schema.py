"""What of a JSON schema xgrammar reads past in silence, so that it can be refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: Levels of a schema; xgrammar takes six seconds for 300 of them, and far more for a thousand.
MAX_DEPTH = 64
#: Keywords that xgrammar 0.2.8 does not enforce; `tests/engine/test_schema.py` shows it for each.
_UNENFORCED = frozenset(
    {"uniqueItems", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"}
    | {"dependencies", "not", "if", "$dynamicRef", "$recursiveRef"}
)
#: Where one of these stands, the keywords beside it that constrain are passed over.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_CONSTRAINTS = frozenset(
    {"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"}
    | {"maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const", *_ALONE}
)
_LOOKAROUND = re.compile(r"\(\?(=|!|<=|<!)")


def unenforced(schema: Any) -> str | None:
    """A keyword of a schema, or of one inside it, that would not be kept; None where all are."""
    waiting = [(schema, 1)]  # no recursion: how deep it is, is the client's choice
    while waiting:
        current, depth = waiting.pop()
        if isinstance(current, Mapping):
            if depth > MAX_DEPTH:
                return f"nesting of more than {MAX_DEPTH} levels"
            found = next((key for key in current if key in _UNENFORCED), None) or _unenforced_here(current)
            if found:
                return found
            waiting += [(inner, depth + 1) for inner in _inner(current)]
    return None


def deeper_than(schema: Any, levels: int) -> bool:
    """Whether a schema has more levels, of any of its members: what is not known here is counted too."""
    waiting = [(schema, 1)]
    while waiting:
        current, depth = waiting.pop()
        if isinstance(current, (Mapping, list)):
            if depth > levels:
                return True
            inner = current.values() if isinstance(current, Mapping) else current
            waiting += [(item, depth + 1) for item in inner]
    return False


def _unenforced_here(schema: Mapping[str, Any]) -> str | None:
    options, reference, pattern = schema.get("allOf"), schema.get("$ref"), schema.get("pattern")
    if isinstance(options, list) and len(options) > 1:
        return "allOf"
    if isinstance(reference, str) and not reference.startswith("#"):
        return "$ref"
    if isinstance(pattern, str) and _LOOKAROUND.search(pattern):
        return "pattern"
    required, properties = schema.get("required"), schema.get("properties", {})
    if isinstance(required, list) and isinstance(properties, Mapping) and set(map(str, required)) - set(properties):
        return "required"
    if alone := next((key for key in _ALONE if key in schema), None):
        return next((key for key in schema if key in _CONSTRAINTS and key != alone), None)
    return None


def _inner(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(named := schema.get(key), Mapping):
            yield from named.values()
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(listed := schema.get(key), list):
            yield from listed
    for key in ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames"):
        yield schema.get(key)
