"""Tools over HTTP: chosen, called, streamed and answered, in the syntax of each expert's own template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server.family import Running
from server.refusals import refused
from server.tool_templates import HERMES, LLAMA, MISTRAL

from meswitch_cli.engine.contract import Sampling
from meswitch_cli.server.schemas import ChatRequest
from meswitch_cli.server.tools import Tool
from meswitch_cli.server.tools.syntax import MISTRAL as MISTRAL_SYNTAX
from meswitch_cli.server.turn import TurnPrompt, with_tools
from zoo.tiny_tokenizer import tiny_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}
HELLO = [{"role": "user", "content": "hello"}]
ASKED: dict[str, Any] = {"messages": HELLO, "tools": [WEATHER, TIME], "max_tokens": 300, "temperature": 1}
EXPERTS = {"red": HERMES, "green": LLAMA, "blue": MISTRAL}


@pytest.fixture(autouse=True, scope="module")
def taught(running: Running) -> Iterator[None]:
    """Each expert has the template of another family."""
    tokenizers = {name: running.service.engine.tokenizer(name) for name in EXPERTS}
    before = {name: tokenizer.chat_template for name, tokenizer in tokenizers.items()}
    for name, template in EXPERTS.items():
        tokenizers[name].chat_template = template
    yield
    for name, tokenizer in tokenizers.items():
        tokenizer.chat_template = before[name]


def test_markers_that_are_special_tokens_are_shown() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    body = ChatRequest.model_validate({"model": "red"} | ASKED)
    prompt = TurnPrompt("red", (5,), MISTRAL_SYNTAX, [Tool("get_time", None, {"type": "object"})], "auto")
    assert with_tools(Sampling(), body, prompt, tokenizer).shown_tokens == (len(tokenizer) - 1,)
    assert with_tools(Sampling(), body, prompt, tiny_tokenizer()).shown_tokens == ()


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def check_call(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "get_weather":
        assert set(value) == {"city", "days"} and value["city"] in ("Bonn", "Rome") and 1 <= value["days"] <= 9
    else:
        assert (name, value) == ("get_time", {})


@pytest.mark.parametrize("model", EXPERTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_function_is_called(client: openai.OpenAI, model: str, seed: int) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    one = client.chat.completions.create(
        model=model, **ASKED, seed=seed, tool_choice=named, parallel_tool_calls=False
    ).choices[0]
    assert one.message.content is None and one.finish_reason == "tool_calls"
    (call,) = one.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    check_call(call.function.name, call.function.arguments)


@pytest.mark.parametrize("model", EXPERTS)
def test_a_stream_of_calls_says_what_the_whole_says(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, **ASKED, "seed": 4, "tool_choice": "required"}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.message.tool_calls
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0]
    told = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    streamed = [(call.function.name, call.function.arguments) for call in final.message.tool_calls or ()]
    assert streamed == told and final.finish_reason == whole.finish_reason
    for name, arguments in told[:-1] if whole.finish_reason == "length" else told:
        check_call(name, arguments)
    if model == "green":
        assert len(told) == 1  # Llama's template accepts one call a message
    parts = [part.choices[0].delta for part in client.chat.completions.create(**options, stream=True)]
    begun = [call for delta in parts for call in delta.tool_calls or () if call.id]
    assert [call.index for call in begun] == list(range(len(told)))
    assert sum(bool(delta.tool_calls) for delta in parts) > 3  # arguments come as they are generated


@pytest.mark.parametrize("model", EXPERTS)
def test_none_calls_nothing_and_says_nothing_of_tools(running: Running, model: str) -> None:
    body = ASKED | {"model": model, "temperature": 0, "max_tokens": 12, "tool_choice": "none"}
    # A grammar lets no row of the embedding pass that is no token; without one, a random model says them too.
    body["logit_bias"] = {str(row): -100 for row in range(261, 268)}
    plain = {key: value for key, value in body.items() if key not in ("tools", "tool_choice")}
    answers = [running.post("/v1/chat/completions", asked).json() for asked in (body, plain)]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


def biased(running: Running, model: str, text: str) -> dict[str, Any]:
    """A request that says this text, if it may: its tokens are all that is likely, in their order of rank."""
    tokenizer = running.service.engine.tokenizer(model)
    return {"logit_bias": {str(token): 100 for token in set(tokenizer.encode(text, add_special_tokens=False))}}


def test_words_beside_tools_are_words(running: Running) -> None:
    body = ASKED | {"model": "red", "max_tokens": 12, "seed": 1} | biased(running, "red", "ab")
    choice = running.post("/v1/chat/completions", body).json()["choices"][0]
    assert set(choice["message"]["content"]) == {"a", "b"} and choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    stream = running.post("/v1/chat/completions", body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == choice["message"]["content"]


def test_a_format_holds_for_what_is_no_call(running: Running) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    for seed in range(4):
        body = ASKED | {"model": "red", "seed": seed, "response_format": wanted}
        choice = running.post("/v1/chat/completions", body).json()["choices"][0]
        if calls := choice["message"].get("tool_calls"):
            check_call(calls[0]["function"]["name"], calls[0]["function"]["arguments"])
        else:
            assert set(json.loads(choice["message"]["content"])) == {"ok"}


@pytest.mark.parametrize("model", EXPERTS)
def test_results_go_back_as_the_client_kept_them(client: openai.OpenAI, running: Running, model: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    said = (
        client.chat.completions.create(model=model, **ASKED, seed=3, tool_choice=named, parallel_tool_calls=False)
        .choices[0]
        .message
    )
    (call,) = said.tool_calls or ()
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    for dumped in (said.model_dump(), said.model_dump(exclude_none=True), said):
        again = client.chat.completions.create(
            model=model, messages=[*HELLO, dumped, result], tools=[WEATHER], max_tokens=4, temperature=0
        )
        assert again.choices[0].finish_reason in ("stop", "length")
    foreign = {"id": "call_of_another_server", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    history = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [foreign]},
        {"role": "tool", "tool_call_id": foreign["id"], "content": "sun"},
    ]
    told = running.post("/tokenize", {"model": model, "messages": history})
    text = running.post("/detokenize", {"model": model, "tokens": told.json()["tokens"]}).json()["prompt"]
    assert '"get_weather"' in text and "{}" in text and "<|tool|>sun" in text


@pytest.mark.parametrize(
    ("change", "parameter", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "invalid_value"),
        ({"tools": [TIME, TIME]}, "tools.1.function.name", "invalid_value"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice", "invalid_value"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_value"),
        ({"tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "no such"}}}]},
            "tools",
            "invalid_value",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"not": {"type": "null"}}},
                    }
                ]
            },
            "tools.0.function.parameters",
            "invalid_value",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    running: Running, change: dict[str, Any], parameter: str, code: str
) -> None:
    refused(running.post("/v1/chat/completions", ASKED | {"model": "red"} | change), 400, parameter, code)


def test_a_schema_that_is_not_strict_is_kept_as_far_as_can_be(running: Running) -> None:
    parameters = PARAMETERS | {"not": {"required": ["x"]}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    body = ASKED | {"model": "red", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "seed": 0}
    call = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["tool_calls"][0]
    check_call(call["function"]["name"], call["function"]["arguments"])


def test_allowed_tools_are_those_that_may_be_called(running: Running) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    body = ASKED | {"model": "blue", "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}, "n": 2}
    for choice in running.post("/v1/chat/completions", body | {"parallel_tool_calls": False}).json()["choices"]:
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_time"]


@pytest.mark.parametrize(
    ("message", "parameter", "code"),
    [
        ({"role": "tool", "content": "x"}, "messages.1.tool_call_id", "missing_parameter"),
        ({"role": "function", "name": "f", "content": "x"}, "messages.1.role", "invalid_value"),
        ({"content": "x"}, "messages.1.role", "missing_parameter"),
        ({"role": "assistant", "content": None}, "messages.1.content", "missing_parameter"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages.1.content", "missing_parameter"),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{"}}]},
            "messages.1.tool_calls.0.function.arguments",
            "invalid_value",
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [{"id": "x"}]},
            "messages.1.tool_calls",
            "unsupported_parameter",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_message_that_is_none_is_refused_by_name(
    running: Running, message: dict[str, Any], parameter: str, code: str
) -> None:
    body = {"model": "red", "messages": [*HELLO, message], "max_tokens": 2}
    refused(running.post("/v1/chat/completions", body), 400, parameter, code)
