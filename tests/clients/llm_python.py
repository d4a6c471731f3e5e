"""llm, with a model of the server's added as its documentation says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

FOLDER = tempfile.mkdtemp()
os.environ["LLM_USER_PATH"] = FOLDER

import llm  # noqa: E402
from cases import MODEL, WEATHER, check_weather, run  # noqa: E402


def model(url: str) -> llm.Model:
    named = f"- model_id: here\n  model_name: {MODEL}\n  api_base: {url}/v1\n"
    entry = f"{named}  supports_tools: true\n  supports_schema: true\n"
    Path(FOLDER, "extra-openai-models.yaml").write_text(entry)
    return llm.get_model("here")


def chat(url: str) -> None:
    assert model(url).prompt("hello", stream=False, max_tokens=8, key="none").text()


def stream(url: str) -> None:
    assert len(list(model(url).prompt("hello", max_tokens=8, key="none"))) > 1


def schema(url: str) -> None:
    check_weather(model(url).prompt("hello", schema=WEATHER, max_tokens=200, stream=False, key="none").text())


def tools(url: str) -> None:
    def now() -> str:
        """The time."""
        return "noon"

    told = model(url).chain("hello", tools=[now], options={"max_tokens": 8}, key="none", stream=False)
    assert [response.text() for response in told.responses()]


if __name__ == "__main__":
    run("llm", {"chat": chat, "stream": stream, "JSON schema": schema, "tools": tools})
