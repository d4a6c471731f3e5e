"""litellm, as its proxy and many libraries call it."""

from __future__ import annotations

import json

import litellm
from cases import MODEL, WEATHER, check_weather, run

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
NAME = f"hosted_vllm/{MODEL}"


def ask(url: str, messages: list = HELLO, **options: object) -> object:
    return litellm.completion(model=NAME, api_base=f"{url}/v1", api_key="none", messages=messages, **options)


def chat(url: str) -> None:
    assert ask(url, max_tokens=8).choices[0].message.content


def stream(url: str) -> None:
    parts = list(ask(url, max_tokens=8, stream=True, stream_options={"include_usage": True}))
    assert any(getattr(part, "usage", None) for part in parts)


def schema(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    check_weather(ask(url, max_tokens=200, response_format=form).choices[0].message.content)


def tools(url: str) -> None:
    options = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    said = ask(url, **options).choices[0].message
    check_weather(said.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "rain"}
    for kept in (said, said.model_dump(), json.loads(said.model_dump_json())):
        ask(url, messages=[*HELLO, kept, result], tools=[TOOL], max_tokens=4)


def streamed_tools(url: str) -> None:
    options = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    parts = list(ask(url, stream=True, **options))
    whole = litellm.stream_chunk_builder(parts, messages=HELLO)
    check_weather(whole.choices[0].message.tool_calls[0].function.arguments)


def embeddings(url: str) -> None:
    litellm.embedding(model="hosted_vllm/base", api_base=f"{url}/v1", api_key="none", input=["hello"])


if __name__ == "__main__":
    cases = {"chat": chat, "stream": stream, "JSON schema": schema, "tools": tools, "streamed tools": streamed_tools}
    run("litellm", cases | {"embeddings": embeddings})
