"""The log: a line of JSON for each request, and prompts in none of them unless that was asked for."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import sys
from typing import Any

import pytest
from server.family import Running, Start
from server.logged import lines

from meswitch_cli.server.errors import ApiError, error_response
from meswitch_cli.server.logs import ConsoleFormatter, JsonFormatter, configure_logging
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.settings import ServerSettings

SECRET = "swordfish"


def ask_all(server: Running) -> list[str]:
    """Answered, streamed, refused and failed, each with the secret in it; the ids of the requests."""
    two = {"model": "red", "max_tokens": 2, "ignore_eos": True}
    chat = two | {"messages": [{"role": "user", "content": SECRET}], "user": "u-1"}
    completion = two | {"prompt": SECRET}
    responses = [
        server.post("/v1/chat/completions", chat),
        server.post("/v1/chat/completions", chat | {"stream": True}),
        server.post("/v1/chat/completions", chat | {"max_tokens": 100_000}),
        server.post("/v1/completions", completion),
        server.post("/v1/completions", completion | {"stop": SECRET * 99}),
        server.post("/tokenize", {"model": "red", "prompt": SECRET}),
    ]
    assert [response.status_code for response in responses] == [200, 200, 400, 200, 400, 200]
    return [response.headers["x-request-id"] for response in responses]


@pytest.mark.parametrize("asked_for", [False, True], ids=["by default", "--log-prompts"])
def test_prompts_are_logged_only_where_asked_for(
    asked_for: bool, start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(settings=ServerSettings(log_prompts=asked_for))
    with caplog.at_level(logging.DEBUG, "meswitch_cli"):
        ids = ask_all(server)
        logged = lines(caplog, ids)
    by_id = {line["request_id"]: line for line in logged if "request_id" in line}
    assert set(by_id) == set(ids)
    assert (SECRET in json.dumps(logged)) == asked_for
    first = by_id[ids[0]]
    assert (first["status"], first["expert"], first["reason"], first["completion_tokens"]) == (200, "red", "pinned", 2)
    assert first["user"] == "u-1" and first["path"] == "/v1/chat/completions" and first["level"] == "info"
    assert by_id[ids[2]]["status"] == 400
    told = [line for line in logged if "prompt" in line]
    assert len(told) == (4 if asked_for else 0)  # both endpoints, once the body was a request


def test_a_refused_request_says_why(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start_server(settings=ServerSettings(max_body_bytes=2048))
    chat = {"model": "red", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    refused = {
        "max_tokens: 100000 is too many": chat | {"max_tokens": 100_000},
        "model 'violet' is not served; there are": chat | {"model": "violet"},
        "unknown parameter: colour": chat | {"colour": SECRET},
        "missing parameter: messages": {"model": "red"},
        "temperature: Input should be": chat | {"temperature": "hot"},
        "the body is larger": chat | {"user": "x" * 4000},
    }
    with caplog.at_level(logging.DEBUG, "meswitch_cli"):
        ids = {
            reason: server.post("/v1/chat/completions", body).headers["x-request-id"]
            for reason, body in refused.items()
        }
        ids["there is nothing at POST /v1/nothing"] = server.post("/v1/nothing", {}).headers["x-request-id"]
        answered = server.post("/v1/chat/completions", chat)
        logged = lines(caplog, [*ids.values(), answered.headers["x-request-id"]])
    by_id = {line["request_id"]: line for line in logged if "request_id" in line}
    for reason, request_id in ids.items():
        assert reason in str(by_id[request_id].get("error")), by_id[request_id]
    assert answered.status_code == 200 and "error" not in by_id[answered.headers["x-request-id"]]
    assert SECRET not in json.dumps(logged)


def test_words_of_a_template_that_refuses_stay_out_of_the_log() -> None:
    told = ApiError(400, f"does not accept these messages: {SECRET}", logged="does not accept these messages")
    record = RequestRecord("id", "POST", "/v1/chat/completions")
    scope: dict[str, Any] = {"type": "http"}
    record.attach(scope)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(error_response(told)(scope, None, send))  # type: ignore[arg-type]
    assert SECRET in sent[1]["body"].decode() and record.error == "does not accept these messages"


def console_line(message: str, *arguments: object, level: int = logging.INFO, **fields: Any) -> str:
    record = logging.LogRecord("meswitch_cli.x", level, "", 0, message, arguments, None)
    if fields:
        record.fields = fields
    return ConsoleFormatter().format(record)


def test_lines_for_people() -> None:
    request = {
        "request_id": "r",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "milliseconds": 1234.5,
    }
    line = console_line(
        "%s %s",
        "POST",
        "/v1/chat/completions",
        **request,
        expert="red",
        reason="routed",
        prompt_tokens=7,
        completion_tokens=9,
    )
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d info    POST /v1/chat/completions 200 1,23[45] ms red \(routed\) 7\+9 tokens", line
    )
    refused = console_line("%s %s", "GET", "/x", **request | {"status": 404}, error="there is nothing\n\x1b[2J here")
    assert refused.endswith(r"404 1,234 ms error: there is nothing\n\x1b[2J here") and "\x1b" not in refused
    assert console_line("two\nlines", level=logging.WARNING).endswith(r"warning two\nlines")
    assert console_line("loaded", expert="red").endswith("info    loaded expert=red")
    try:
        raise ValueError("it broke")
    except ValueError:
        failed = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert ConsoleFormatter().format(failed).endswith("ValueError: it broke")


@pytest.mark.parametrize(
    ("style", "terminal", "made"),
    [
        ("auto", True, ConsoleFormatter),
        ("auto", False, JsonFormatter),
        ("json", True, JsonFormatter),
        ("console", False, ConsoleFormatter),
    ],
)
def test_the_style_follows_the_terminal(
    style: Any, terminal: bool, made: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    loggers = [logging.getLogger(name) for name in ("meswitch_cli", "uvicorn")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    try:
        configure_logging("info", style)
        assert [type(logger.handlers[0].formatter) for logger in loggers] == [made, made]
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_a_line_is_json_whatever_is_in_it() -> None:
    record = logging.LogRecord("meswitch_cli.x", logging.ERROR, "", 0, "two\nlines and \u2028 %s", ("\x00",), None)
    record.fields = {"prompt": {"not json": {1, 2}}}
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"].startswith("two\nlines")


def test_a_line_goes_to_what_stderr_is_at_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while something moves on a terminal, where another stream stands in for it."""
    logger = logging.getLogger("meswitch_cli")
    before = logger.handlers[:], logger.propagate, logger.level
    first, second = io.StringIO(), io.StringIO()
    try:
        monkeypatch.setattr(sys, "stderr", first)
        configure_logging("info", "console")
        monkeypatch.setattr(sys, "stderr", second)
        logger.warning("hello")
    finally:
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
    assert first.getvalue() == "" and "hello" in second.getvalue()
