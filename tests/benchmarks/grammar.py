"""JSON by xgrammar and by llguidance: what each enforces, and what a mask costs. Writes docs/results/grammar.md.

    python tests bench grammar [--repeats 5]

Needs `pip install llguidance`, which is no dependency of ours. Both run in one process, in turns, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.machine import describe
from zoo.base import GGUF_FILE, gguf_folder

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "grammar.md"
VOCABULARY = 49152
TEXT: dict[str, Any] = {"type": "string"}
SHORT: dict[str, Any] = {"type": "string", "maxLength": 40}
WHOLE: dict[str, Any] = {"type": "integer"}


def closed(properties: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """An object of these members, all required, and no others: what clients' libraries make of a class."""
    required = list(properties)
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    } | more


_ADDRESS = closed({"street": TEXT, "town": TEXT, "code": {"type": "string", "pattern": "^[0-9]{5}$"}})
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": closed({"name": TEXT, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}})},
}
#: Schemas as clients send them, each with a value that satisfies it.
TIMED: Mapping[str, tuple[Any, Any]] = {
    "any object": ({"type": "object"}, {"a": [1, 2.5, {"b": None}], "long name": "some words of text", "c": True}),
    "flat, six members": (
        closed({"name": TEXT, "age": WHOLE, "email": TEXT, "active": {"type": "boolean"}, "score": {"type": "number"}}),
        {"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "active": True, "score": 9.75},
    ),
    "an enumeration of 50": (
        closed({"country": {"enum": [f"country number {n}" for n in range(50)]}}),
        {"country": "country number 37"},
    ),
    "limits on lengths and numbers": (
        closed({"title": SHORT, "stars": {"type": "integer", "minimum": 1, "maximum": 5}, "note": SHORT}),
        {"title": "a book about apples", "stars": 4, "note": "worth reading twice"},
    ),
    "a text of at most 400 characters": (
        closed({"text": {"type": "string", "maxLength": 400}}),
        {"text": "some words of text that say nothing, but are words of text"},
    ),
    "nested, with a pattern": (
        closed({"person": TEXT, "addresses": {"type": "array", "items": _ADDRESS, "maxItems": 3}}),
        {
            "person": "Tom",
            "addresses": [
                {"street": "Long Lane 4", "town": "York", "code": "12345"},
                {"street": "Mill Road", "town": "Leeds", "code": "54321"},
            ],
        },
    ),
    "a tree, by reference": (
        _TREE,
        {"name": "a", "children": [{"name": "b", "children": []}, {"name": "c", "children": []}]},
    ),
    "one of four shapes": (
        {
            "anyOf": [
                closed({"kind": {"const": f"shape {n}"}} | {f"side {m}": WHOLE for m in range(n + 1)}) for n in range(4)
            ]
        },
        {"kind": "shape 3", "side 0": 4, "side 1": 5, "side 2": 6, "side 3": 7},
    ),
}
_ARRAY: dict[str, Any] = {"type": "array", "items": WHOLE}
_OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": WHOLE, "b": WHOLE}}
#: Most of these our server refuses, as xgrammar passes them over: a schema, a text that breaks it, one that keeps it.
KEYWORDS: Sequence[tuple[str, Any, str, str]] = (
    ("`uniqueItems`", _ARRAY | {"uniqueItems": True}, "[1, 1]", "[1, 2]"),
    ("`contains`", _ARRAY | {"contains": {"const": 3}}, "[1]", "[3]"),
    ("`dependentRequired`", _OBJECT | {"dependentRequired": {"a": ["b"]}}, '{"a": 1}', '{"a": 1, "b": 2}'),
    ("`dependentSchemas`", _OBJECT | {"dependentSchemas": {"a": {"required": ["b"]}}}, '{"a": 1}', '{"b": 1}'),
    ("`dependencies`", _OBJECT | {"dependencies": {"a": ["b"]}}, '{"a": 1}', '{"b": 1}'),
    ("`not`", WHOLE | {"not": {"const": 1}}, "1", "2"),
    ("`if`", {"if": WHOLE, "then": {"minimum": 5}}, "3", "7"),
    ("several `allOf`", {"allOf": [WHOLE, {"minimum": 5}]}, "3", "7"),
    ("a constraint beside `$ref`", {"$ref": "#/$defs/i", "minimum": 5, "$defs": {"i": WHOLE}}, "3", "7"),
    ("a constraint beside `anyOf`", {"type": "integer", "anyOf": [{"minimum": 5}, TEXT]}, '"x"', "7"),
    ("`oneOf` whose branches overlap", {"oneOf": [WHOLE, {"type": "number"}]}, "3", "3.5"),
    ("look-around in a `pattern`", TEXT | {"pattern": "^(?=a)ab$"}, '"b"', '"ab"'),
    ("`required` that is no property", {"type": "object", "required": ["a"]}, "{}", '{"a": 1}'),
    ("`minProperties`", {"type": "object", "minProperties": 2}, '{"a": 1}', '{"a": 1, "b": 2}'),
    ("`patternProperties`", {"type": "object", "patternProperties": {"^a": WHOLE}}, '{"a": "x"}', '{"a": 1}'),
    ("`multipleOf`", WHOLE | {"multipleOf": 7}, "5", "14"),
    ('`format: "date"`', TEXT | {"format": "date"}, '"x"', '"2026-11-26"'),
)


@dataclass
class Times:
    """Of one engine and schema: milliseconds of compiling, microseconds of each mask and of each token taken."""

    compiling: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    taking: list[float] = field(default_factory=list)


@dataclass
class Steps:
    """A schema compiled: `mask()` fills a mask, `take(token)` goes on, `ends()` says whether the text may end here."""

    mask: Callable[[], Any]
    take: Callable[[int], bool]
    ends: Callable[[], bool]


class Xgrammar:
    name = "xgrammar"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        import xgrammar

        self._module = xgrammar
        self.version = version("xgrammar")
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCABULARY)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._bitmask = xgrammar.allocate_token_bitmask(1, VOCABULARY)
        self._end = tokenizer.eos_token_id

    def compile(self, schema: Any) -> Steps:
        """Raises RuntimeError where it refuses the schema."""
        compiled = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        matcher = self._module.GrammarMatcher(compiled)
        return Steps(
            lambda: matcher.fill_next_token_bitmask(self._bitmask),
            matcher.accept_token,
            lambda: matcher.is_terminated() or matcher.accept_token(self._end),
        )


class Llguidance:
    name = "llguidance"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        import llguidance
        import llguidance.hf
        import llguidance.torch

        self._module = llguidance
        self.version = version("llguidance")
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=VOCABULARY)
        self._bitmask = llguidance.torch.allocate_token_bitmask(1, VOCABULARY)

    def compile(self, schema: Any) -> Steps:
        """Raises RuntimeError where it refuses the schema."""
        written = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = self._module.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=written)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        matcher = self._module.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise RuntimeError(matcher.get_error())
        return Steps(
            lambda: self._module.torch.fill_next_token_bitmask(matcher, self._bitmask),
            matcher.consume_token,
            matcher.is_accepting,
        )


Engine = Xgrammar | Llguidance


def measure(engine: Engine, schema: Any, tokens: Sequence[int], times: Times) -> None:
    """One text under the grammar, each mask filled. Raises AssertionError where the text is not let."""
    before = time.thread_time()
    steps = engine.compile(schema)
    times.compiling.append(1e3 * (time.thread_time() - before))
    for token in tokens:
        before = time.thread_time()
        steps.mask()
        between = time.thread_time()
        let = steps.take(token)
        after = time.thread_time()
        assert let, f"{engine.name} does not let {json.dumps(schema)[:80]} be written as the tokens are"
        times.masks.append(1e6 * (between - before))
        times.taking.append(1e6 * (after - between))
    steps.mask()
    assert steps.ends()


def verdict(engine: Engine, schema: Any, breaks: Sequence[int], keeps: Sequence[int]) -> str:
    """Refused, enforced, passed over, or wrong: it forbids what the schema allows."""
    try:
        if not _lets(engine.compile(schema), keeps):
            return "forbids what is right"
        return "passed over" if _lets(engine.compile(schema), breaks) else "enforced"
    except RuntimeError:
        return "refused"


def _lets(steps: Steps, tokens: Sequence[int]) -> bool:
    return all(steps.take(token) for token in tokens) and steps.ends()


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(engines: Sequence[Engine], times: Mapping[str, Mapping[str, Times]], rows: Sequence[Sequence[str]]) -> str:
    names = [engine.name for engine in engines]
    versions = ", ".join(f"{engine.name} {engine.version}" for engine in engines)
    lines = [
        "# Grammars of JSON",
        "",
        "Which tokens may come next, by xgrammar, which the server uses, and by llguidance: one process, a thread, in",
        f"turns. {versions}, the tokenizer of SmolLM2 ({VOCABULARY} tokens). JSON is written in one way, with a space",
        "behind `:` and `,`. Each text was read token by token, a mask filled before each. Times are processor time.",
        "",
        f"`python tests bench grammar`; {describe()}.",
        "",
        "## What a mask costs",
        "",
        "| schema | tokens | "
        + " | ".join(f"{name}: compile, ms | mask p50, µs | p99 | most" for name in names)
        + " |",
        "|---" * (2 + 4 * len(names)) + "|",
    ]
    for title, of in times.items():
        cells = []
        for name in names:
            one = of[name]
            masks = (statistics.median(one.masks), _percentile(one.masks, 0.99), max(one.masks))
            cells += [f"{statistics.median(one.compiling):.2f}", *(f"{value:.0f}" for value in masks)]
        count = len(of[names[0]].masks) // len(of[names[0]].compiling)
        lines.append(f"| {title} | {count} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What is enforced",
        "",
        "A text that breaks the schema and one that keeps it, each read whole.",
        "",
        "| in the schema | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
    engines = (Xgrammar(tokenizer), Llguidance(tokenizer))
    times = {title: {engine.name: Times() for engine in engines} for title in TIMED}
    for repeat in range(given.repeats):
        for title, (schema, value) in TIMED.items():
            tokens = tokenizer.encode(json.dumps(value), add_special_tokens=False)
            for engine in engines if repeat % 2 == 0 else reversed(engines):
                measure(engine, schema, tokens, times[title][engine.name])
    rows = []
    for title, schema, *texts in KEYWORDS:
        breaks, keeps = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        rows.append([title, *(verdict(engine, schema, breaks, keeps) for engine in engines)])
    text = report(engines, times, rows)
    print(text)
    _, mark, said = (
        RESULTS.read_text(encoding="utf-8").partition("\n## What follows\n") if RESULTS.exists() else ("",) * 3
    )
    RESULTS.write_text(text + mark + said, encoding="utf-8")


if __name__ == "__main__":
    main()
