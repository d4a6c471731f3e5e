"""The official client against the running server."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest

from .conftest import Running

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_models_say_what_weights_answer(client: openai.OpenAI, running: Running) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"base", "red", "green", "blue"}
    served = {expert.name: expert for expert in running.service.engine.experts()}
    for name, expert in served.items():
        extra = models[name].model_extra or {}
        assert (extra["artifact"], extra["bytes"]) == (expert.digest, expert.nbytes)
        assert (extra["kind"], extra["residency"], extra["slot"]) == ("expert", "device", expert.slot)
    assert client.models.retrieve("red").id == "red"


def test_a_chat_names_who_answered(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="red", messages=HELLO, max_tokens=8, temperature=0)
    answer = raw.parse()
    assert answer.object == "chat.completion" and answer.model == "red"
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (raw.headers["x-meswitch-expert"], raw.headers["x-meswitch-reason"]) == ("red", "pinned")
    assert (raw.headers["x-meswitch-confidence"], raw.headers["x-meswitch-router-ms"]) == ("1.0000", "0.0")


@pytest.mark.parametrize("model", ["red", "green", "base"])
def test_a_stream_says_what_the_whole_says(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert {part.id for part in parts} == {parts[0].id} and {part.model for part in parts} == {model}
    assert parts[0].choices[0].delta.role == "assistant"
    finishes = [part.choices[0].finish_reason for part in parts if part.choices]
    assert finishes[:-1] == [None] * (len(finishes) - 1) and finishes[-1] == whole.choices[0].finish_reason
    assert parts[-1].choices == [] and whole.usage is not None
    assert parts[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": parts[-1].usage.prompt_tokens_details}
    )
    assert all(part.usage is None for part in parts[:-1])


def test_a_streamed_completion(client: openai.OpenAI) -> None:
    options = {"model": "blue", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options, echo=True)
    parts = list(client.completions.create(**options, stream=True))
    assert whole.choices[0].text == "abc" + "".join(part.choices[0].text for part in parts)
    echoed = list(client.completions.create(**options, stream=True, echo=True))
    assert "".join(part.choices[0].text for part in echoed) == whole.choices[0].text


def test_several_prompts_and_choices_come_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="red", prompt=["abc", "xyz"], n=2, max_tokens=6, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
    alone = client.completions.create(model="red", prompt="xyz", max_tokens=6, temperature=0)
    assert alone.choices[0].text == texts[2]


def test_a_seed_decides_and_each_choice_has_its_own(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int) -> list[str | None]:
        answer = client.chat.completions.create(model="red", messages=HELLO, max_tokens=12, seed=seed, n=n)
        return [choice.message.content for choice in answer.choices]

    first = texts(7, 3)
    assert first == texts(7, 3) and first[:1] == texts(7, 1)
    assert len(set(first)) == 3 and first != texts(8, 3)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="red", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content and answer.usage and len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-6
    spelled = b"".join(bytes(token.bytes or ()) for token in content).decode("utf-8", "replace")
    assert spelled.startswith((answer.choices[0].message.content or "")[:1])


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="red", prompt="abc", max_tokens=5, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values())
    parts = list(
        client.completions.create(model="red", prompt="abc", max_tokens=5, temperature=0, logprobs=2, stream=True)
    )
    streamed = [part.choices[0].logprobs for part in parts]
    assert [value for part in streamed for value in part.token_logprobs] == logprobs.token_logprobs
    assert [value for part in streamed for value in part.text_offset] == logprobs.text_offset


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
        "required": ["ok", "colour"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="red", messages=HELLO, max_tokens=200, seed=seed, response_format=wanted
        )
        value = json.loads(answer.choices[0].message.content or "")
        assert set(value) == {"ok", "colour"} and isinstance(value["ok"], bool) and value["colour"] in ("red", "blue")


def test_a_schema_that_is_none_is_refused_by_name(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="red", messages=HELLO, response_format=wanted)
    assert caught.value.param == "response_format"


def test_stop_strings_and_the_reason(client: openai.OpenAI) -> None:
    options = {"model": "red", "messages": HELLO, "max_tokens": 30, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content or ""
    stopped = client.chat.completions.create(**options, stop=text[2:4]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[2:4])], "stop")
    cut = client.chat.completions.create(**{**options, "max_tokens": 2}).choices[0]
    assert cut.finish_reason == "length"


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="violet", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as invalid:
        client.chat.completions.create(model="red", messages=HELLO, extra_body={"colour": 1})
    assert invalid.value.param == "colour"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="red", messages=HELLO, stream=True, temperature=3)


def test_many_at_once_answer_as_each_alone(client: openai.OpenAI, running: Running) -> None:
    """Greedy tokens of mixed batches, streamed and not, are those of each request by itself."""
    cases = [
        {"model": model, "prompt": f"{word} {model}", "max_tokens": 16, "temperature": 0}
        for model in ("red", "green", "blue", "base")
        for word in ("one", "two", "three", "four")
    ]
    alone = [client.completions.create(**case).choices[0].text for case in cases]
    asynchronous = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

    async def ask(case: dict[str, object], stream: bool) -> str:
        if not stream:
            return (await asynchronous.completions.create(**case)).choices[0].text
        parts = await asynchronous.completions.create(**case, stream=True)
        return "".join([part.choices[0].text async for part in parts])

    async def everything() -> list[str]:
        async with asynchronous:
            return await asyncio.gather(*(ask(case, index % 2 == 0) for index, case in enumerate(cases)))

    assert asyncio.run(everything()) == alone
