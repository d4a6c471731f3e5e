"""A schema is enforced or refused: each keyword that is refused is one that xgrammar would pass over."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar

from meswitch_cli.engine.schema import MAX_DEPTH, unenforced
from zoo.tiny_tokenizer import tiny_tokenizer

INTEGER: dict[str, Any] = {"type": "integer"}
STRING: dict[str, Any] = {"type": "string"}
ARRAY: dict[str, Any] = {"type": "array", "items": INTEGER}
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}}


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tiny_tokenizer(), vocab_size=268))


def lets_pass(compiler: xgrammar.GrammarCompiler, schema: Any, text: str) -> bool:
    """Whether the grammar takes the text as a whole."""
    compiled = compiler.compile_json_schema(json.dumps(schema))
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=False)
    end = compiled.tokenizer_info.stop_token_ids[0]
    return bool(matcher.accept_string(text) and matcher.accept_token(end))


@pytest.mark.parametrize(
    ("keyword", "schema", "text"),
    [
        ("uniqueItems", ARRAY | {"uniqueItems": True}, "[1, 1]"),
        ("contains", ARRAY | {"contains": {"const": 3}}, "[1]"),
        ("dependentRequired", OBJECT | {"dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
        ("dependentSchemas", OBJECT | {"dependentSchemas": {"a": {"required": ["b"]}}}, '{"a": 1}'),
        ("dependencies", OBJECT | {"dependencies": {"a": ["b"]}}, '{"a": 1}'),
        ("not", INTEGER | {"not": {"const": 1}}, "1"),
        ("if", {"if": INTEGER, "then": {"minimum": 5}}, "3"),
        ("allOf", {"allOf": [INTEGER, {"minimum": 5}]}, "3"),
        ("$ref", {"$ref": "http://127.0.0.1/x"}, "1"),
        ("$dynamicRef", {"$dynamicRef": "#x"}, "1"),
        ("minimum", {"$ref": "#/$defs/i", "minimum": 5, "$defs": {"i": INTEGER}}, "3"),
        ("pattern", STRING | {"pattern": "(?=a)b"}, '"b"'),
        ("required", {"type": "object", "required": ["a"]}, "{}"),
        ("required", {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}, "{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_passed_over_is_named(
    keyword: str, schema: Any, text: str, compiler: xgrammar.GrammarCompiler
) -> None:
    assert lets_pass(compiler, schema, text)  # once this fails, the keyword need not be refused any more
    assert unenforced(schema) == keyword
    for outer in ({"type": "object", "properties": {"x": schema}}, {"type": "array", "items": schema}):
        assert unenforced(outer) == keyword
    assert unenforced({"anyOf": [STRING, schema], "title": "either"}) == keyword
    assert unenforced({"$ref": "#/$defs/x", "$defs": {"x": schema}}) == keyword


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (INTEGER | {"minimum": 5}, "3"),
        (INTEGER | {"exclusiveMaximum": 5}, "5"),
        (INTEGER | {"multipleOf": 7}, "5"),
        (STRING | {"minLength": 3}, '"a"'),
        (STRING | {"maxLength": 1}, '"abc"'),
        (STRING | {"pattern": "^a+$"}, '"b"'),
        (STRING | {"format": "date"}, '"x"'),
        (ARRAY | {"minItems": 2}, "[1]"),
        (ARRAY | {"maxItems": 1}, "[1, 1]"),
        ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False}, "[1, 2]"),
        (OBJECT | {"additionalProperties": False}, '{"c": 1}'),
        (OBJECT | {"required": ["b"]}, '{"a": 1}'),
        ({"type": "object", "propertyNames": {"pattern": "^b$"}}, '{"a": 1}'),
        ({"anyOf": [INTEGER, STRING], "description": "either"}, "true"),
        ({"enum": ["a", 2]}, '"b"'),
        ({"const": 3}, "4"),
        ({"$ref": "#/$defs/i", "$defs": {"i": INTEGER}}, "true"),
        ({"allOf": [INTEGER]}, "true"),
        ({"type": ["string", "null"]}, "1"),
        ({"type": "object", "properties": {"not": INTEGER}, "required": ["not"]}, "{}"),
    ],
    ids=str,
)
def test_what_is_enforced_is_not_refused(schema: Any, text: str, compiler: xgrammar.GrammarCompiler) -> None:
    assert unenforced(schema) is None
    assert not lets_pass(compiler, schema, text)


@pytest.mark.parametrize("levels", [MAX_DEPTH, MAX_DEPTH + 1, 5000])
def test_a_schema_has_a_depth(levels: int) -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels - 1):
        schema = {"anyOf": [schema]}
    assert (unenforced(schema) is None) == (levels <= MAX_DEPTH)
