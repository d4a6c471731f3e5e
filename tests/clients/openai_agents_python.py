"""openai-agents, over chat completions and over the Responses API."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from cases import MODEL, run
from pydantic import BaseModel

set_tracing_disabled(True)
CALLED: list[str] = []


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Bonn", "Rome"]


@function_tool
def weather(city: Literal["Bonn", "Rome"]) -> str:
    """The weather of a city."""
    CALLED.append(city)
    return "rain"


def agent(url: str, kind: Any, **options: Any) -> Agent:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return Agent(name="a", instructions="Be brief.", model=kind(model=MODEL, openai_client=client), **options)


def said(url: str, kind: Any) -> None:
    made = agent(url, kind, model_settings=ModelSettings(max_tokens=8))
    assert asyncio.run(Runner.run(made, "hello")).final_output


def streamed(url: str, kind: Any, max_tokens: int = 8, **options: Any) -> None:
    async def read() -> int:
        made = agent(url, kind, model_settings=ModelSettings(max_tokens=max_tokens), **options)
        result = Runner.run_streamed(made, "hello")
        return len([event async for event in result.stream_events()])

    assert asyncio.run(read()) > 2


def called(url: str, kind: Any) -> None:
    """A call is required, and its result is the agent's."""
    CALLED.clear()
    settings = ModelSettings(max_tokens=100, tool_choice="required", parallel_tool_calls=False)
    ends = {"tool_use_behavior": "stop_on_first_tool"}
    asyncio.run(Runner.run(agent(url, kind, tools=[weather], model_settings=settings, **ends), "hello"))
    assert CALLED and set(CALLED) <= {"Bonn", "Rome"}


if __name__ == "__main__":
    run(
        "openai-agents",
        {
            "chat": lambda url: said(url, OpenAIChatCompletionsModel),
            "stream": lambda url: streamed(url, OpenAIChatCompletionsModel),
            "tools": lambda url: called(url, OpenAIChatCompletionsModel),
            "Responses": lambda url: (
                # To this client an answer of the Responses API that ends at the most tokens is an error.
                streamed(url, OpenAIResponsesModel, max_tokens=200, output_type=Weather),
                called(url, OpenAIResponsesModel),
            ),
        },
    )
