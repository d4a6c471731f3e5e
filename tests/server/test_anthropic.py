"""Anthropic's `/v1/messages`: text, calls, events, counted tokens, and errors in its own envelope."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server.family import Running, Start
from server.test_tools import PARAMETERS, check_call

from meswitch_cli.server.settings import ServerSettings

ASKED: dict[str, Any] = {
    "model": "red",
    "max_tokens": 24,
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
}
TOOL = {"name": "get_weather", "description": "x", "input_schema": PARAMETERS}
CALLS = {"max_tokens": 200, "tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}


pytestmark = pytest.mark.usefixtures("taught")


def ask(running: Running, **change: Any) -> dict[str, Any]:
    response = running.post("/v1/messages", ASKED | change)
    assert response.status_code == 200, response.text
    return dict(response.json())


def events_of(running: Running, **change: Any) -> list[dict[str, Any]]:
    response = running.post("/v1/messages", ASKED | change | {"stream": True})
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def chat(running: Running, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    body = {"model": "red", "messages": messages, "max_tokens": 24, "temperature": 0} | more
    return dict(running.post("/v1/chat/completions", body).json())


def test_a_text_is_that_of_a_chat(running: Running) -> None:
    blocks: list[dict[str, Any]] = [{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}}]
    blocks += [{"type": "text", "text": "brief."}]
    told = ask(running, system=blocks, metadata={"user_id": "me"})
    same = chat(running, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    assert told["content"] == [{"type": "text", "text": same["choices"][0]["message"]["content"]}]
    reasons = {"length": "max_tokens", "stop": "end_turn"}
    assert told["stop_reason"] == reasons[same["choices"][0]["finish_reason"]] and told["stop_sequence"] is None
    usage = told["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == same["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == same["usage"]["completion_tokens"]
    assert (told["type"], told["role"], told["model"]) == ("message", "assistant", "red")


def test_a_stop_sequence_is_named(running: Running) -> None:
    text = ask(running)["content"][0]["text"]
    told = ask(running, stop_sequences=[text[3:5], "never said"])
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", text[3:5])
    assert told["content"][0]["text"] == text[: text.index(text[3:5])]


def test_events_of_a_text(running: Running) -> None:
    whole, events = ask(running), events_of(running)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert events[0]["message"]["content"] == [] and events[0]["message"]["usage"]["input_tokens"] > 0
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == whole["content"][0]["text"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_calls_and_their_events(running: Running) -> None:
    told = ask(running, **CALLS, temperature=1)
    (block,) = told["content"]
    assert (block["type"], told["stop_reason"]) == ("tool_use", "tool_use")
    check_call(block["name"], json.dumps(block["input"]))
    events = events_of(running, **CALLS, temperature=1)
    begun = events[1]["content_block"]
    assert (begun["type"], begun["name"], begun["input"]) == ("tool_use", "get_weather", {})
    pieces = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert len(pieces) > 3
    check_call("get_weather", "".join(pieces))
    history = [
        *ASKED["messages"],
        {"role": "assistant", "content": told["content"]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    again = ask(running, messages=history, tools=[TOOL], max_tokens=3)
    function = {"name": block["name"], "arguments": json.dumps(block["input"])}
    same = chat(
        running,
        [
            *ASKED["messages"],
            {"role": "assistant", "content": None, "tool_calls": [{"id": block["id"], "function": function}]},
            {"role": "tool", "tool_call_id": block["id"], "content": "rain"},
            {"role": "user", "content": "And now?"},
        ],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}],
        max_tokens=3,
    )
    assert sum(again["usage"].values()) - again["usage"]["output_tokens"] == same["usage"]["prompt_tokens"]
    assert [part["text"] for part in again["content"]] == [same["choices"][0]["message"]["content"]]


def test_a_call_that_is_cut_off_is_not_told_as_whole(running: Running) -> None:
    told = ask(running, **CALLS | {"max_tokens": 60}, temperature=1)
    assert (told["content"], told["stop_reason"]) == ([], "max_tokens")


def test_an_answer_may_be_begun_by_the_client(running: Running) -> None:
    begun = [*ASKED["messages"], {"role": "assistant", "content": "Once"}]
    continued = ask(running, messages=begun)
    same = chat(running, begun, continue_final_message=True)
    assert continued["content"][0]["text"] == same["choices"][0]["message"]["content"]
    usage = continued["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == same["usage"]["prompt_tokens"]


def test_tokens_are_counted_as_they_are_used(running: Running) -> None:
    for more in ({}, {"tools": [TOOL]}, {"system": "Be brief."}):
        body = {"model": "red", "messages": ASKED["messages"]} | more
        counted = running.post("/v1/messages/count_tokens", body)
        assert counted.status_code == 200, counted.text
        usage = ask(running, **more, max_tokens=1)["usage"]
        assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    ("change", "status", "kind", "named"),
    [
        ({"model": "violet"}, 404, "not_found_error", "violet"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "role"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "invalid_request_error", "thinking"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.type",
        ),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice"),
        ({"max_tokens": 900}, 400, "invalid_request_error", "max_tokens"),
        # One message each that a template is given.
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}] * 1025}]},
            400,
            "invalid_request_error",
            "messages",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors_are_in_anthropics_envelope(
    running: Running, change: dict[str, Any], status: int, kind: str, named: str
) -> None:
    response = running.post("/v1/messages", ASKED | change)
    assert response.status_code == status, response.text
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", kind) and named in error["error"]["message"]


def test_the_key_may_be_in_anthropics_header(start_server: Start) -> None:
    server = start_server(settings=ServerSettings(api_keys=("one",)))
    refused = server.post("/v1/messages", ASKED, headers={"x-api-key": "two"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert server.post("/v1/messages", ASKED, headers={"x-api-key": "one"}).status_code == 200
