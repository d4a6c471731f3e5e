"""anthropic for Python."""

from __future__ import annotations

import anthropic
from cases import MODEL, WEATHER, check_weather, run

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = {
    "tools": [{"name": "weather", "input_schema": WEATHER}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "max_tokens": 200,
}


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def chat(url: str) -> None:
    said = client(url).messages.create(model=MODEL, messages=HELLO, max_tokens=8, system="Be brief.")
    assert said.content[0].text and said.usage.output_tokens <= 8


def stream(url: str) -> None:
    with client(url).messages.stream(model=MODEL, messages=HELLO, max_tokens=8) as events:
        text = "".join(events.text_stream)
        assert text == events.get_final_message().content[0].text


def tools(url: str) -> None:
    said = client(url).messages.create(model=MODEL, messages=HELLO, **TOOLS)
    check_weather(said.content[0].input)
    result = {"type": "tool_result", "tool_use_id": said.content[0].id, "content": "rain"}
    history = [*HELLO, {"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
    client(url).messages.create(model=MODEL, messages=history, tools=TOOLS["tools"], max_tokens=4)


def streamed_tools(url: str) -> None:
    with client(url).messages.stream(model=MODEL, messages=HELLO, **TOOLS) as events:
        (block,) = events.get_final_message().content
    check_weather(block.input)


def count(url: str) -> None:
    assert client(url).messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0


def error(url: str) -> None:
    try:
        client(url).messages.create(model="violet", messages=HELLO, max_tokens=8)
    except anthropic.NotFoundError:
        return
    raise AssertionError("an unknown model was answered")


if __name__ == "__main__":
    cases = {"chat": chat, "stream": stream, "tools": tools, "streamed tools": streamed_tools}
    run("anthropic", cases | {"counted tokens": count, "errors": error})
