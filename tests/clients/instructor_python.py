"""instructor, in its modes for OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Literal

import instructor
import openai
from cases import MODEL, run
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Bonn", "Rome"]
    days: Annotated[int, Field(ge=1, le=9)]


def ask(url: str, mode: instructor.Mode, stream: bool = False) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode)
    options = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "max_retries": 0}
    if stream:
        *_, made = client.chat.completions.create_partial(response_model=Weather, **options)
    else:
        made = client.chat.completions.create(response_model=Weather, **options)
    assert made.city in ("Bonn", "Rome") and 1 <= made.days <= 9


def schema(url: str) -> None:
    ask(url, instructor.Mode.JSON_SCHEMA)


def tools(url: str) -> None:
    ask(url, instructor.Mode.TOOLS)


def streamed_tools(url: str) -> None:
    ask(url, instructor.Mode.TOOLS, stream=True)


if __name__ == "__main__":
    run("instructor", {"JSON schema": schema, "tools": tools, "streamed tools": streamed_tools})
