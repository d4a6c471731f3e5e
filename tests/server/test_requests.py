"""Requests as they should not be: each is refused in OpenAI's envelope, by the name of what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server.family import Running, Start
from server.logged import lines
from server.refusals import CHAT, refused

from meswitch_cli.server.settings import ServerSettings


@pytest.mark.parametrize(
    ("change", "parameter", "code"),
    [
        ({"colour": 1}, "colour", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_parameter"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"min_tokens": 5}, "min_tokens", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"seed": 1 << 63}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_parameter"),
        ({"messages": [{"role": "user", "content": "x", "age": 3}]}, "messages.0.age", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "context_length_exceeded"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_chat_is_refused_by_the_parameters_name(
    running: Running, change: dict[str, Any], parameter: str, code: str
) -> None:
    for stream in (False,) if "stream_options" in change else (False, True):
        response = running.post("/v1/chat/completions", CHAT | change | {"stream": stream})
        assert parameter.split(".")[0] in refused(response, 400, parameter, code)


@pytest.mark.parametrize(
    ("change", "parameter", "code"),
    [
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [5, 99999]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt.0", "invalid_value"),
        ({"prompt": ["a"] * 33}, "prompt", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_completion_is_refused_by_the_parameters_name(
    running: Running, change: dict[str, Any], parameter: str, code: str
) -> None:
    response = running.post("/v1/completions", {"model": "red", "prompt": "hello", "max_tokens": 2} | change)
    refused(response, 400, parameter, code)


def test_parameters_that_ask_for_nothing_are_taken(running: Running) -> None:
    nothing = {"tools": [], "tool_choice": "none", "store": False, "n": None, "logit_bias": None, "stop": None}
    assert running.post("/v1/chat/completions", CHAT | nothing).status_code == 200


@pytest.mark.parametrize(
    "members",
    [
        {"annotations": []},
        {"annotations": None, "audio": None, "refusal": None, "function_call": None, "tool_calls": None},
        {"provider_specific_fields": None, "reasoning_content": None, "thinking_blocks": None},
        {"reasoning_content": "", "reasoning": "", "refusal": ""},
        {"tool_calls": [], "name": None, "images": [], "provider_specific_fields": {}},
        {"content": [{"type": "text", "text": "hello", "cache_control": None, "annotations": []}]},
    ],
    ids=str,
)
def test_a_message_may_come_back_as_a_library_dumps_it(running: Running, members: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": "hello"}
    plain = CHAT | {"messages": [*CHAT["messages"], said, *CHAT["messages"]]}
    dumped = CHAT | {"messages": [*CHAT["messages"], said | members, *CHAT["messages"]]}
    answers = [running.post("/v1/chat/completions", body) for body in (plain, dumped)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
    whole, again = (answer.json() for answer in answers)
    assert (whole["choices"], whole["usage"]) == (again["choices"], again["usage"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"whatever": None, "metadata": {}, "logprobs": None, "response_format": None}),
        ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": None, "x": None}}),
        ("/v1/chat/completions", CHAT | {"response_format": {"type": "text", "json_schema": None, "y": None}}),
        ("/v1/completions", {"model": "red", "prompt": "x", "max_tokens": 2, "suffix": None, "echo": None}),
        ("/tokenize", {"model": "red", "prompt": "x", "messages": None, "add_special_tokens": None}),
        ("/detokenize", {"model": "red", "tokens": [9], "skip_special_tokens": None}),
    ],
    ids=str,
)
def test_null_is_absent_wherever_it_stands(running: Running, path: str, body: dict[str, Any]) -> None:
    def without(value: Any) -> Any:
        return {key: without(item) for key, item in value.items() if item is not None} if type(value) is dict else value

    answers = [running.post(path, item) for item in (body, without(body))]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text


def test_null_where_a_member_is_needed_is_a_missing_one(running: Running) -> None:
    message = refused(running.post("/v1/chat/completions", CHAT | {"model": None}), 400, "model", "missing_parameter")
    assert "model" in message
    null = [{"role": "user", "content": None}]
    refused(
        running.post("/v1/chat/completions", CHAT | {"messages": null}), 400, "messages.0.content", "missing_parameter"
    )


def test_what_changes_no_token_is_taken_and_noted(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    hints = {
        "metadata": {"run": "7"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "service_tier": "flex",
        "verbosity": "low",
    }
    with caplog.at_level("INFO", "meswitch_cli.server"):
        responses = [running.post("/v1/chat/completions", CHAT | more) for more in ({}, hints | {"store": False})]
        ids = [response.headers["x-request-id"] for response in responses]
        noted = {line["request_id"]: line.get("hints") for line in lines(caplog, ids) if "request_id" in line}
    plain, hinted = (response.json() for response in responses)
    assert plain["choices"] == hinted["choices"] and plain["usage"] == hinted["usage"]
    assert [noted[request] for request in ids] == [None, hints]


@pytest.mark.parametrize("member", [{"audio": {"a": "b"}}, {"annotations": [{"type": "x"}]}, {"reasoning": "hm"}])
def test_what_asks_for_something_is_refused_by_name(running: Running, member: dict[str, Any]) -> None:
    (name,) = member
    refused(running.post("/v1/chat/completions", CHAT | member), 400, name, "unsupported_parameter")
    messages = [{"role": "user", "content": "x"} | member]
    refused(
        running.post("/v1/chat/completions", CHAT | {"messages": messages}),
        400,
        f"messages.0.{name}",
        "unsupported_parameter",
    )


@pytest.mark.parametrize(
    ("stop", "biased", "text", "tokens"),
    [
        ("<|user|>", ["<|user|>"], "", 1),
        (["Human:", "<|user|>"], ["<|user|>"], "", 1),
        ("</s>", ["</s>"], "", 1),
        ("<|user|><|user|>", ["<|user|>"], "", 2),
        ("!<|user|>", ["!", "<|user|>"], None, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_may_be_special_tokens(
    running: Running, stop: Any, biased: list[str], text: str | None, tokens: int | None, stream: bool
) -> None:
    """Only the biased tokens are ever drawn, and nothing else would end the text."""
    tokenizer = running.service.engine.tokenizer("red")
    bias = {str(tokenizer.encode(token, add_special_tokens=False)[0]): 100 for token in biased}
    body = {"model": "red", "prompt": "x", "logit_bias": bias, "max_tokens": 60, "seed": 1, "temperature": 2}
    whole = running.post("/v1/completions", body | {"stop": stop, "ignore_eos": True, "return_token_ids": True}).json()
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "stop"
    if text is not None:
        assert (choice["text"], whole["usage"]["completion_tokens"]) == (text, tokens)
    else:  # the first ! that the special token follows
        ids = list(bias)
        made = "".join("!" if str(token) == ids[0] else "#" for token in choice["token_ids"])
        assert made.endswith("!#") and made.count("!#") == 1
        assert choice["text"] == made.removesuffix("!#").replace("#", "")
    if stream:
        answer = running.post("/v1/completions", body | {"stop": stop, "ignore_eos": True, "stream": True})
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert "".join(item["choices"][0]["text"] for item in events) == choice["text"]
        assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_unknown_model_is_404_and_never_the_base(running: Running) -> None:
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [9]}),
    ):
        response = running.post(path, body | {"model": "violet"})
        assert "'red'" in refused(response, 404, "model", "model_not_found")
        assert "x-meswitch-expert" not in response.headers
    refused(running.get("/v1/models/violet"), 404, "model", "model_not_found")


@pytest.mark.parametrize("token", [300, 49152, (1 << 31) - 1])
def test_a_token_that_nobody_knows_has_no_text(running: Running, token: int) -> None:
    refused(running.post("/detokenize", {"model": "red", "tokens": [9, token]}), 400, "tokens", "invalid_value")
    assert running.post("/detokenize", {"model": "red", "tokens": [9]}).status_code == 200


def test_nobody_is_offered_who_is_not_there(running: Running) -> None:
    response = running.post("/v1/chat/completions", CHAT | {"model": "violet"})
    message = refused(response, 404, "model", "model_not_found")
    assert "'base'" in message and "auto" not in message


def test_auto_without_a_router_says_so(running: Running) -> None:
    message = refused(running.post("/v1/chat/completions", CHAT | {"model": "auto"}), 404, "model", "model_not_found")
    assert "--router" in message
    refused(running.post("/v1/route", {"prompt": "x"}), 404, "model", "model_not_found")


def test_a_template_that_refuses_is_the_clients_error(running: Running) -> None:
    tokenizer = running.service.engine.tokenizer("blue")
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ raise_exception('roles must alternate') }}"
    try:
        response = running.post("/v1/chat/completions", CHAT | {"model": "blue"})
        assert "roles must alternate" in refused(response, 400, "messages", "chat_template_error")
        assert response.headers["x-meswitch-expert"] == "blue"
        tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"  # the sandbox holds
        refused(running.post("/v1/chat/completions", CHAT | {"model": "blue"}), 400, "messages", "chat_template_error")
        tokenizer.chat_template = None
        refused(running.post("/v1/chat/completions", CHAT | {"model": "blue"}), 400, "model", "no_chat_template")
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"{", "application/json", "invalid_json"),
        (b'{"model": NaN, "prompt": ""}', "application/json", "invalid_value"),
        (b"[]", "application/json", "invalid_body"),
        (b"", "application/json", "invalid_body"),
        (b"{}", "text/plain", "invalid_body"),
        (b"[" * 100_000, "application/json", "bad_request"),
        (b'{"model": "\\ud800", "prompt": "x"}', "application/json", "invalid_json"),
        (b'{"model": "red", "prompt": ["\\ud800"]}', "application/json", "invalid_json"),
        (b'{"\\ud800": 1}', "application/json", "invalid_json"),
        (b'{"model": "\xff"}', "application/json", "bad_request"),
    ],
    ids=["cut", "nan", "list", "empty", "text", "deep", "surrogate", "surrogate in a list", "surrogate key", "bytes"],
)
def test_a_body_that_is_no_request(running: Running, content: bytes, kind: str, code: str) -> None:
    response = running.request("POST", "/v1/completions", content=content, headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code), response.text


def test_paths_and_methods_that_do_not_exist(running: Running) -> None:
    refused(running.get("/v2/nothing"), 404, None, "not_found")
    response = running.get("/v1/chat/completions")
    refused(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_body_has_a_limit_announced_or_not(start_server: Start) -> None:
    server = start_server(settings=ServerSettings(max_body_bytes=2000))
    big = b'{"model": "red", "prompt": "' + b"x" * 3000 + b'"}'
    kind = {"content-type": "application/json"}
    refused(server.request("POST", "/v1/completions", content=big, headers=kind), 413, None, "body_too_large")
    chunked = server.request("POST", "/v1/completions", content=iter([big[:1500], big[1500:]]), headers=kind)
    refused(chunked, 413, None, "body_too_large")
    assert server.post("/v1/chat/completions", CHAT).status_code == 200


def test_request_ids_are_kept_or_made(running: Running) -> None:
    assert running.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = running.get("/health", headers={"x-request-id": 'a"b'}).headers["x-request-id"]
    assert len(made) == 32
