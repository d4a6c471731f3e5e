"""openai for Python."""

from __future__ import annotations

import openai
from cases import MODEL, WEATHER, check_weather, run

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(url: str) -> None:
    said = client(url).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    assert said.choices[0].message.content and said.usage.completion_tokens <= 8


def stream(url: str) -> None:
    parts = list(client(url).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True))
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def schema(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    said = client(url).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=200, response_format=form)
    check_weather(said.choices[0].message.content)


def tools(url: str) -> None:
    options = {"model": MODEL, "tools": [TOOL], "max_tokens": 200, "parallel_tool_calls": False}
    said = client(url).chat.completions.create(messages=HELLO, tool_choice="required", **options).choices[0].message
    (call,) = said.tool_calls
    check_weather(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    client(url).chat.completions.create(messages=[*HELLO, said, result], **options | {"max_tokens": 4})


def streamed_tools(url: str) -> None:
    options = {"model": MODEL, "tools": [TOOL], "max_tokens": 200, "parallel_tool_calls": False}
    with client(url).chat.completions.stream(messages=HELLO, tool_choice="required", **options) as events:
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    check_weather(call.function.arguments)


def responses(url: str) -> None:
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    options = {"model": MODEL, "input": "hello", "max_output_tokens": 200, "tools": [tool], "tool_choice": "required"}
    with client(url).responses.stream(**options, parallel_tool_calls=False) as events:
        (call,) = events.get_final_response().output
    check_weather(call.arguments)


def embeddings(url: str) -> None:
    (vector,) = client(url).embeddings.create(model="base", input="hello").data
    assert abs(sum(value * value for value in vector.embedding) - 1) < 1e-3


if __name__ == "__main__":
    run(
        "openai",
        {
            "chat": chat,
            "stream": stream,
            "JSON schema": schema,
            "tools": tools,
            "streamed tools": streamed_tools,
            "Responses": responses,
            "embeddings": embeddings,
        },
    )
