"""The log: a line of JSON for each request, and prompts in none of them unless that was asked for."""

from __future__ import annotations

import json
import logging
import time

import pytest
from server.family import Running, Start

from meswitch_cli.server.logs import JsonFormatter
from meswitch_cli.server.settings import ServerSettings

SECRET = "swordfish"


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, object]]:
    """What was logged of `count` requests; a line comes just after its answer."""
    deadline = time.monotonic() + 5
    while True:
        logged = [json.loads(JsonFormatter().format(record)) for record in tuple(caplog.records)]
        requests = [line for line in logged if "request_id" in line]
        if len(requests) == count:
            return logged
        assert time.monotonic() < deadline, requests
        time.sleep(0.01)


def ask_all(server: Running) -> list[str]:
    """Answered, streamed, refused and failed, each with the secret in it; the ids of the requests."""
    chat = {"model": "red", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2, "user": "u-1"}
    completion = {"model": "red", "prompt": SECRET, "max_tokens": 2}
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
        logged = lines(caplog, len(ids))
    by_id = {line["request_id"]: line for line in logged if "request_id" in line}
    assert set(by_id) == set(ids)
    assert (SECRET in json.dumps(logged)) == asked_for
    first = by_id[ids[0]]
    assert (first["status"], first["expert"], first["reason"], first["completion_tokens"]) == (200, "red", "pinned", 2)
    assert first["user"] == "u-1" and first["path"] == "/v1/chat/completions" and first["level"] == "info"
    assert by_id[ids[2]]["status"] == 400
    told = [line for line in logged if "prompt" in line]
    assert len(told) == (4 if asked_for else 0)  # both endpoints, once the body was a request


def test_a_line_is_json_whatever_is_in_it() -> None:
    record = logging.LogRecord("meswitch_cli.x", logging.ERROR, "", 0, "two\nlines and \u2028 %s", ("\x00",), None)
    record.fields = {"prompt": {"not json": {1, 2}}}
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"].startswith("two\nlines")
