"""langchain-anthropic."""

from __future__ import annotations

from cases import MODEL, WEATHER, check_weather, run
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage

TOOL = {"name": "weather", "description": "x", "input_schema": WEATHER}


def model(url: str, **options: object) -> ChatAnthropic:
    return ChatAnthropic(model=MODEL, base_url=url, api_key="none", max_retries=0, **{"max_tokens": 200} | options)


def chat(url: str) -> None:
    assert model(url, max_tokens=8).invoke("hello").content


def stream(url: str) -> None:
    assert len(list(model(url, max_tokens=8).stream("hello"))) > 1


def tools(url: str) -> None:
    said = model(url).bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False).invoke("hello")
    (call,) = said.tool_calls
    check_weather(call["args"])
    result = ToolMessage("rain", tool_call_id=call["id"])
    model(url, max_tokens=4).bind_tools([TOOL]).invoke([HumanMessage("hello"), said, result])


def streamed_tools(url: str) -> None:
    whole = None
    for part in model(url).bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False).stream("hello"):
        whole = part if whole is None else whole + part
    check_weather(whole.tool_calls[0]["args"])


if __name__ == "__main__":
    run("langchain-anthropic", {"chat": chat, "stream": stream, "tools": tools, "streamed tools": streamed_tools})
