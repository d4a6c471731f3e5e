"""langchain-openai."""

from __future__ import annotations

from cases import MODEL, WEATHER, check_weather, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

TOOL = {"type": "function", "function": {"name": "weather", "description": "x", "parameters": WEATHER}}


def model(url: str, **options: object) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, **{"max_tokens": 200} | options)


def chat(url: str) -> None:
    assert model(url, max_tokens=8).invoke("hello").content


def stream(url: str) -> None:
    assert len(list(model(url, max_tokens=8).stream("hello"))) > 1


def schema(url: str) -> None:
    shape = {"title": "weather", "description": "x"} | WEATHER
    for method in ("json_schema", "function_calling"):
        check_weather(model(url).with_structured_output(shape, method=method).invoke("hello"))


def tools(url: str) -> None:
    bound = model(url).bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
    said = bound.invoke("hello")
    (call,) = said.tool_calls
    check_weather(call["args"])
    result = ToolMessage("rain", tool_call_id=call["id"])
    model(url, max_tokens=4).bind_tools([TOOL]).invoke([HumanMessage("hello"), said, result])


def streamed_tools(url: str) -> None:
    bound = model(url).bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
    whole = None
    for part in bound.stream("hello"):
        whole = part if whole is None else whole + part
    check_weather(whole.tool_calls[0]["args"])


def responses(url: str) -> None:
    assert model(url, max_tokens=8, use_responses_api=True).invoke("hello").content


def embeddings(url: str) -> None:
    made = OpenAIEmbeddings(model="base", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    assert len(made.embed_documents(["hello", "there"])) == 2


if __name__ == "__main__":
    cases = {"chat": chat, "stream": stream, "JSON schema": schema, "tools": tools, "streamed tools": streamed_tools}
    run("langchain-openai", cases | {"Responses": responses, "embeddings": embeddings})
