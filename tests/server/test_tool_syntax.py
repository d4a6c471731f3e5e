"""Calls in each syntax: what the grammar lets pass, and what is read out of it, in pieces of any size."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import xgrammar
from server.tool_templates import TEMPLATES

from meswitch_cli.server.tools import AnswerPart, CallParser, CallPart, Tool, for_syntax, structural_tag, syntax_of
from meswitch_cli.server.tools.syntax import (
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_SPACED,
    TOLD,
    CallSyntax,
)
from zoo.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

SYNTAXES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL_SPACED, "mistral args": MISTRAL_ARGS}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (Tool("get_weather", "The weather.", WEATHER), Tool("get", None, {"type": "object", "properties": {}}))
#: JSON whose strings hold what ends an object outside of them.
ARGUMENTS = ['{"city": "}]\\"{ <tool_call>", "days": 3}', '{"city": "Köln"}']


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tiny_tokenizer(), vocab_size=268))


def passes(compiler: xgrammar.GrammarCompiler, tag: dict[str, Any], text: str) -> bool:
    """Whether the grammar takes the text as a whole."""
    compiled = compiler.compile_structural_tag(json.dumps(tag))
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=False)
    return bool(matcher.accept_string(text) and matcher.accept_token(compiled.tokenizer_info.stop_token_ids[0]))


def written(syntax: CallSyntax, *arguments: str) -> str:
    calls = [f"{syntax.head_of('get_weather')}{text}{syntax.tail}" for text in arguments]
    return f"{syntax.before}{syntax.between.join(calls)}{syntax.after}"


def read(syntax: CallSyntax, pieces: list[str]) -> tuple[str, list[tuple[str, str, bool]]]:
    """The text, and each call's name, arguments and whether it is whole."""
    parser = CallParser(syntax, [tool.name for tool in TOOLS])
    parts: list[AnswerPart] = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    text, calls = "", []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name is not None:
                assert part.id is not None and len(part.id) == 9 and part.index == len(calls)
                calls.append((part.name, "", False))
            name, arguments, _ = calls[part.index]
            calls[part.index] = (name, arguments + part.arguments, part.complete)
        else:
            text += part
    assert parser.calls == len(calls)
    return text, calls


def cut(text: str, seed: int) -> list[str]:
    """The text in pieces, none of them long."""
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.randint(1, 1 + seed * 3)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_template_teaches_its_syntax(name: str) -> None:
    assert syntax_of(TEMPLATES[name]) is SYNTAXES[name]


def test_a_template_without_tools_teaches_none() -> None:
    assert syntax_of(CHAT_TEMPLATE) is TOLD and not TOLD.taught
    assert syntax_of(TEMPLATES["mistral"].replace("] [", "][")) is MISTRAL
    assert syntax_of("{% for t in tools %}<|DSML|>{% endfor %}") is TOLD  # one that nobody here can read


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_what_may_be_said_under_each_choice(syntax: CallSyntax, compiler: xgrammar.GrammarCompiler) -> None:
    one, two = written(syntax, ARGUMENTS[0]), written(syntax, *ARGUMENTS)
    wrong = one.replace("days", "hours")
    unknown = one.replace("get_weather", "get_time")
    auto = structural_tag(syntax, TOOLS, "auto")
    assert passes(compiler, auto, "Just words.") and passes(compiler, auto, one)
    assert passes(compiler, auto, two) == syntax.several
    required = structural_tag(syntax, TOOLS, "required")
    assert passes(compiler, required, one) and passes(compiler, required, two) == syntax.several
    assert not passes(compiler, required, "Just words.")
    for tag in (auto, required):
        assert not passes(compiler, tag, wrong) and not passes(compiler, tag, unknown)
    once = structural_tag(syntax, TOOLS, "required", several=False)
    assert passes(compiler, once, one) and not passes(compiler, once, two)
    none = structural_tag(syntax, TOOLS, "none")
    assert passes(compiler, none, "Just words.") and not passes(compiler, none, one)
    formed = structural_tag(syntax, TOOLS, "auto", text=WEATHER)
    assert passes(compiler, formed, one) and passes(compiler, formed, ARGUMENTS[1])
    assert not passes(compiler, formed, "Just words.")


@pytest.mark.parametrize("syntax", [*SYNTAXES.values(), MISTRAL], ids=[*SYNTAXES, "mistral unspaced"])
@pytest.mark.parametrize("seed", range(4))
def test_calls_are_read_whatever_the_pieces(syntax: CallSyntax, seed: int) -> None:
    arguments = ARGUMENTS if syntax.several else ARGUMENTS[:1]
    called = [("get_weather", text, True) for text in arguments]
    answer = written(syntax, *arguments)
    assert read(syntax, cut(answer, seed)) == ("", called)
    assert read(syntax, cut(f"Let me see.\n\n{answer}", seed)) == ("Let me see.", called)
    # What follows a special token is decoded with a space or without one.
    spaced = answer.replace("[TOOL_CALLS][", "[TOOL_CALLS] [").replace("}, {", "},{")
    assert read(syntax, cut(spaced, seed)) == ("", called)


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_an_answer_may_end_anywhere(syntax: CallSyntax) -> None:
    answer = written(syntax, ARGUMENTS[0])
    for size in range(len(answer)):
        text, calls = read(syntax, cut(answer[:size], 2))
        if calls:
            assert text == "" and calls[0][0] == "get_weather"
            assert ARGUMENTS[0].startswith(calls[0][1]) and calls[0][2] == (calls[0][1] == ARGUMENTS[0])
        else:  # nothing is lost of what was no call
            assert text == answer[:size]


@pytest.mark.parametrize("text", ["", " ", "a <tool", "a\n", "  b  \n\n c ", "<tool_cal", "{", '{"a": 1}', "[TOOL"])
@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_words_stay_as_they_are(syntax: CallSyntax, text: str) -> None:
    for seed in range(3):
        assert read(syntax, cut(text, seed)) == (text, [])


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "And in Bonn?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
            for i, city in enumerate(("Bonn", "Köln"))
        ],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "call_0"},
    {"role": "tool", "content": "sun", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "Rain in Bonn."},
]


def test_a_template_is_given_calls_as_it_takes_them() -> None:
    messages, tools = for_syntax(CONVERSATION, TOOLS, HERMES)
    assert [message["role"] for message in messages] == [message["role"] for message in CONVERSATION]
    assert messages[1]["tool_calls"] == CONVERSATION[1]["tool_calls"]
    assert messages[3] == {"role": "tool", "content": "sun", "tool_call_id": "call_1", "name": "get_weather"}
    assert tools is not None and [tool["function"]["name"] for tool in tools] == ["get_weather", "get"]
    mistral, _ = for_syntax(CONVERSATION, TOOLS, MISTRAL)
    ids = [call["id"] for call in mistral[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in mistral[2:4]] == ids and len(set(ids)) == 2
    assert all(len(given) == 9 and given.isalnum() for given in ids)


def test_a_model_without_a_syntax_is_told_one() -> None:
    messages, tools = for_syntax(CONVERSATION, TOOLS, TOLD)
    assert tools is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    told = messages[0]["content"]
    assert "get_weather" in told and '"days"' in told and "<tool_call>" in told
    assert messages[2]["content"] == written(TOLD, '{"city": "Bonn"}', '{"city": "Köln"}')
    assert messages[3]["content"].index("rain") < messages[3]["content"].index("sun")
    assert messages[3]["content"].count("<tool_response>") == 2
    system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    merged, _ = for_syntax(system, TOOLS, TOLD)
    assert len(merged) == 5 and merged[0]["content"].startswith("Be brief.\n\n")
    assert CONVERSATION[1]["content"] == "" and system[0]["content"] == "Be brief."  # what came in is left as it was
