"""Tools on a real model: SmolLM2-135M's vocabulary and template. Its calls need not be clever, but they are calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server.family import Running, serve_engine

import zoo
from meswitch_cli.engine import EngineSettings, TransformersEngine

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city on one of the next days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "unit", "days"],
            "additionalProperties": False,
        },
    },
}
ASKED: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "What will the weather in Paris be in three days, in celsius?"}],
    "max_tokens": 100,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    base = zoo.build(quick=True, experts=()).base
    engine = TransformersEngine(
        EngineSettings(base=str(base), experts={}, dtype="float32", cache_tokens=4096, max_model_len=1024)
    )
    engine.start()
    server: Running = serve_engine(engine)
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    server.stop()


def check(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    assert name == "get_weather" and set(value) == {"city", "unit", "days"}
    assert value["unit"] in ("celsius", "fahrenheit") and 1 <= value["days"] <= 7 and len(value["city"]) <= 20


@pytest.mark.zoo
def test_a_small_model_makes_whole_calls(client: openai.OpenAI) -> None:
    options = ASKED | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(**options).choices[0]
    (call,) = choice.message.tool_calls or ()
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    check(call.function.name, call.function.arguments)
    assert "aris" in json.loads(call.function.arguments)["city"]
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert streamed.function.arguments == call.function.arguments
    warm = options | {"temperature": 1, "tool_choice": "auto"}
    choice = client.chat.completions.create(**warm | {"max_tokens": 40}, seed=1).choices[0]
    for made in choice.message.tool_calls or ():
        if choice.finish_reason == "tool_calls":
            check(made.function.name, made.function.arguments)
    assert choice.message.tool_calls or choice.message.content
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain, 12 degrees."}
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    messages = [*ASKED["messages"], said, result]
    told = client.chat.completions.create(**ASKED | {"messages": messages, "max_tokens": 12})
    assert told.choices[0].message.content


@pytest.mark.zoo
def test_json_comes_to_an_end(client: openai.OpenAI) -> None:
    """Where any white space is allowed, a small model may write line ends until its tokens are used up."""
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    asked = ASKED | {"temperature": 1, "response_format": form}
    for seed in range(2):
        choice = client.chat.completions.create(**asked, seed=seed).choices[0]
        assert choice.finish_reason == "stop"
        check("get_weather", choice.message.content or "")
        assert json.dumps(json.loads(choice.message.content or ""), ensure_ascii=False) == choice.message.content
