"""`/v1/responses` through the official client: text, formats, calls, events, and what is not kept."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from server.family import Running
from server.refusals import refused
from server.test_tools import PARAMETERS, check_call

TOOL = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
ASKED: dict[str, Any] = {"model": "red", "input": "hello", "max_output_tokens": 24, "temperature": 0}


pytestmark = pytest.mark.usefixtures("taught")


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_a_text_is_that_of_a_chat(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, instructions="Be brief.", metadata={"run": "7"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="red", messages=messages, max_tokens=24, temperature=0)
    assert response.output_text == chat.choices[0].message.content and chat.usage and response.usage
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    cut = chat.choices[0].finish_reason == "length"
    assert response.status == ("incomplete" if cut else "completed")
    assert (response.incomplete_details is not None) == cut
    assert (response.model, response.store, response.metadata) == ("red", False, {"run": "7"})
    assert response.temperature == 0 and response.output[0].id.startswith("msg_")


def test_items_are_the_messages_that_they_say(client: openai.OpenAI, running: Running) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well.", "annotations": []}]},
        call | {"id": "fc_1", "status": "completed"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    ]
    calls = [{"id": "call_1", "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}]
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    response = client.responses.create(**ASKED | {"input": items})
    chat = client.chat.completions.create(model="red", messages=messages, max_tokens=24, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage and chat.usage and response.usage.input_tokens == chat.usage.prompt_tokens


def test_events_of_a_text(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    last = "response.incomplete" if whole.status == "incomplete" else "response.completed"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        last,
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_calls_and_their_events(client: openai.OpenAI) -> None:
    options = ASKED | {
        "max_output_tokens": 200,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "parallel_tool_calls": False,
        "temperature": 1,
    }
    response = client.responses.create(**options)
    (call,) = response.output
    assert call.type == "function_call" and call.status == "completed" and response.status == "completed"
    check_call(call.name, call.arguments)
    with client.responses.stream(**options) as stream:
        events = list(stream)
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert len(deltas) > 3 and "".join(event.delta for event in deltas) == done.arguments
    check_call("get_weather", done.arguments)
    assert {event.item_id for event in deltas} == {done.item_id}
    assert events[-1].type == "response.completed"
    history = [
        {"role": "user", "content": "hi"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    more = {"tool_choice": "auto", "max_output_tokens": 3, "input": history}
    again = client.responses.create(**options | more)
    assert again.usage is not None and again.usage.output_tokens <= 3


def test_a_schema_holds(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "name": "weather", "schema": PARAMETERS, "strict": True}
    response = client.responses.create(**ASKED | {"max_output_tokens": 200}, text={"format": wanted})
    check_call("get_weather", response.output_text)


@pytest.mark.parametrize(
    ("change", "parameter", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"background": True}, "background", "invalid_value"),
        ({"truncation": "auto"}, "truncation", "invalid_value"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"max_output_tokens": 600}, "max_output_tokens", "context_length_exceeded"),
        ({"input": []}, "input", "invalid_value"),
        ({"colour": 1}, "colour", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    running: Running, change: dict[str, Any], parameter: str, code: str
) -> None:
    refused(running.post("/v1/responses", ASKED | change), 400, parameter, code)


def test_nulls_of_a_client_ask_for_nothing(running: Running) -> None:
    names = ("previous_response_id", "conversation", "reasoning", "store", "tools", "text", "metadata", "top_logprobs")
    response = running.post("/v1/responses", ASKED | dict.fromkeys(names))
    assert response.status_code == 200 and json.loads(response.text)["object"] == "response"
