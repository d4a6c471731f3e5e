"""Every parameter reaches the engine under its own name, from both endpoints."""

from __future__ import annotations

from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from server.family import Running
from server.tool_templates import HERMES

from meswitch_cli.engine.contract import GenerationRequest, InvalidRequestError, Sampling
from meswitch_cli.engine.requests import check_request
from meswitch_cli.engine.sampling_ranges import RANGES
from meswitch_cli.server.schemas import ChatRequest

#: Parameters that both endpoints have, none at its default, and what the engine is to be told.
COMMON: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": -0.4,
    "logit_bias": {"7": 1.5},
    "stop": ["never said"],
    "stop_token_ids": [9],
    "seed": 5,
    "max_tokens": 3,
    "min_tokens": 2,
    "ignore_eos": True,
}
TOLD = COMMON | {"logit_bias": {7: 1.5}, "stop": ("never said",), "stop_token_ids": (9,)}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def told(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """What the engine is asked, which it then does."""
    seen: list[Sampling] = []
    submit = running.service.engine.submit

    def watch(request: GenerationRequest, on_chunk: Any) -> None:
        seen.append(request.sampling)
        submit(request, on_chunk)

    monkeypatch.setattr(running.service.engine, "submit", watch)
    return seen


def chat(running: Running, **body: Any) -> dict[str, Any]:
    response = running.post(
        "/v1/chat/completions", {"model": "red", "messages": [{"role": "user", "content": "hi"}]} | body
    )
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def test_both_endpoints_tell_the_engine_all(running: Running, told: list[Sampling]) -> None:
    chat(running, **COMMON, logprobs=True, top_logprobs=4)
    running.post("/v1/completions", {"model": "red", "prompt": "hi", "logprobs": 2} | COMMON)
    assert told == [Sampling(**TOLD, logprobs=4), Sampling(**TOLD, logprobs=2)]


def test_no_parameter_of_the_engine_is_out_of_reach(
    running: Running, told: list[Sampling], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.service.engine.tokenizer("red"), "chat_template", HERMES)
    formats = [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}]
    for wanted in formats:
        chat(running, response_format=wanted, max_tokens=60, temperature=0)
    chat(running, tools=[{"type": "function", "function": {"name": "f"}}], max_tokens=2)
    assert (told[0].json_object, told[1].json_schema) == (True, SCHEMA) and told[2].structural_tag
    plain = asdict(Sampling())
    reached = {name for name, value in asdict(Sampling(**TOLD, logprobs=4)).items() if value != plain[name]}
    assert reached | {"json_object", "json_schema", "structural_tag", "shown_tokens", "prompt_logprobs"} == {
        field.name for field in fields(Sampling)
    }


#: By the engine's name of a parameter: the ends of what may be asked, and what lies just beyond them.
ENDS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "temperature": ((0, 2), (-0.01, 2.01, float("nan"))),
    "top_p": ((1e-9, 1), (0, 1.01)),
    "top_k": ((0, 2**31 - 1), (-1, 2**31)),
    "min_p": ((0, 1), (-0.01, 1.01)),
    "repetition_penalty": ((0.01, 10), (0, 0.009, 10.1)),
    "frequency_penalty": ((-2, 2), (-2.1, 2.1)),
    "presence_penalty": ((-2, 2), (-2.1, 2.1)),
    "logit_bias": (({"7": -100}, {"7": 100}), ({"7": -100.1}, {"7": 100.1})),
    "max_tokens": ((1, 2**31 - 1), (0, 2**31)),
    "min_tokens": ((0, 2**31 - 1), (-1, 2**31)),
    "logprobs": ((0, 20), (-1, 21)),
    "stop": (([], ["x"] * 16), (["x"] * 17, [""])),
    "stop_token_ids": (([], [9] * 16), ([9] * 17, [-1])),
}


@pytest.mark.parametrize("name", ENDS)
def test_http_and_the_engine_draw_the_same_lines(name: str) -> None:
    inside, outside = ENDS[name]
    for value in inside:
        asked = ask(name, value)
        assert getattr(asked.sampling(asked.max_tokens or 2**31 - 1), name) == as_told(value)
        check(name, value)
    for value in outside:
        with pytest.raises(ValidationError):
            ask(name, value)
        with pytest.raises(InvalidRequestError) as refused:
            check(name, value)
        assert refused.value.parameter == name


def ask(name: str, value: Any) -> ChatRequest:
    body = {"model": "red", "messages": [{"role": "user", "content": "hi"}]}
    return ChatRequest.model_validate(
        body | ({"logprobs": True, "top_logprobs": value} if name == "logprobs" else {name: value})
    )


def check(name: str, value: Any) -> None:
    """As the engine does."""
    sampling = Sampling(**{"max_tokens": 2**31 - 1} | {name: as_told(value)})
    model: Any = SimpleNamespace(vocabulary=300)
    check_request(GenerationRequest("one", "red", (5,), sampling), model, 2**32)


def as_told(value: Any) -> Any:
    """What is asked over HTTP as the engine is told it."""
    if isinstance(value, dict):
        return {int(token): bias for token, bias in value.items()}
    return tuple(value) if isinstance(value, list) else value


def test_every_range_has_its_ends_tested() -> None:
    assert RANGES.keys() <= ENDS.keys()


def test_null_is_as_good_as_absent(running: Running, told: list[Sampling]) -> None:
    chat(running, **dict.fromkeys(COMMON), max_completion_tokens=2)
    chat(running, max_completion_tokens=2)
    assert told[0] == told[1] == Sampling(max_tokens=2)


def test_what_a_parameter_does_is_seen_in_the_answer(running: Running) -> None:
    def tokens(**body: Any) -> list[int]:
        every = {"max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
        return list(chat(running, **every | body)["token_ids"])

    greedy = tokens(temperature=0)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}):
        assert tokens(temperature=2, seed=3, **narrow) == greedy
    assert tokens(temperature=2, seed=3) != greedy
    assert tokens(temperature=0, logit_bias={"100": 100}) == [100] * 20
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}):
        bias = {"logit_bias": {"100": 100, "101": 99}}
        assert set(tokens(temperature=0, **bias, **penalty)) == {100, 101}
    assert len(set(tokens(temperature=0, repetition_penalty=10))) == 20  # what was said is not said again


def test_a_minimum_is_refused_where_a_format_says_when_to_end(running: Running) -> None:
    body = {"model": "red", "messages": [{"role": "user", "content": "hi"}], "min_tokens": 3, "max_tokens": 9}
    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}):
        response = running.post("/v1/chat/completions", body | {"response_format": wanted})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "min_tokens")
    assert running.post("/v1/chat/completions", body | {"response_format": {"type": "text"}}).status_code == 200
