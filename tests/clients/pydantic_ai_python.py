"""pydantic-ai over OpenAI's two APIs and Anthropic's."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from cases import MODEL, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Bonn", "Rome"]
    days: Annotated[int, Field(ge=1, le=9)]


def model(url: str, kind: type = OpenAIChatModel) -> Any:
    if kind is AnthropicModel:
        return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=url, api_key="none"))
    return kind(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def weather(url: str, output: Any, kind: type = OpenAIChatModel) -> None:
    agent = Agent(
        model(url, kind), output_type=output, model_settings={"max_tokens": 200, "parallel_tool_calls": False}
    )
    made = agent.run_sync("hello").output
    assert made.city in ("Bonn", "Rome") and 1 <= made.days <= 9


def chat(url: str) -> None:
    assert Agent(model(url), model_settings={"max_tokens": 8}).run_sync("hello").output


def stream(url: str) -> None:
    async def read() -> int:
        async with Agent(model(url), model_settings={"max_tokens": 8}).run_stream("hello") as result:
            return len([text async for text in result.stream_text()])

    assert asyncio.run(read()) > 0


def schema(url: str) -> None:
    weather(url, NativeOutput(Weather))


def tools(url: str) -> None:
    weather(url, Weather)


def streamed_tools(url: str) -> None:
    async def read() -> Any:
        settings = {"max_tokens": 200, "parallel_tool_calls": False}
        async with Agent(model(url), output_type=Weather, model_settings=settings).run_stream("hello") as result:
            return await result.get_output()

    assert asyncio.run(read()).city in ("Bonn", "Rome")


def responses(url: str) -> None:
    weather(url, Weather, OpenAIResponsesModel)


def messages(url: str) -> None:
    weather(url, Weather, AnthropicModel)


if __name__ == "__main__":
    cases = {"chat": chat, "stream": stream, "JSON schema": schema, "tools": tools, "streamed tools": streamed_tools}
    run("pydantic-ai-slim", cases | {"Responses": responses, "Anthropic's messages": messages})
