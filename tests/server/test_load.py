"""bench and chat against servers of other kinds: what they say is read as it is meant, or refused in a sentence."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.load import Endpoint, make_workload, run_load
from meswitch_cli.load.client import Outcome
from meswitch_cli.load.conversation import Conversation
from meswitch_cli.load.workload import read_prompts

#: What an answer's stream is made of: pauses in seconds, and events or raw lines.
Script = Sequence[float | str | dict[str, Any]]


@contextmanager
def foreign(models: bytes, script: Script = ()) -> Iterator[str]:
    """A server that gives `models` at every GET and plays the script at every POST."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._begin()
            self.wfile.write(models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._begin()
            for item in script:
                if isinstance(item, float):
                    time.sleep(item)
                else:
                    data = item if isinstance(item, str) else json.dumps(item)
                    self.wfile.write(f"data: {data}\n\n".encode())

        def _begin(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing is written to stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def event(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def load(script: Script) -> Outcome:
    workload = make_workload(["m"], requests=1, concurrency=1, max_tokens=4)
    with foreign(b"", script) as url:
        (outcome,) = asyncio.run(run_load(Endpoint(url), workload))
    return outcome


def test_a_role_sent_ahead_is_no_first_token() -> None:
    """OpenAI's own server says who speaks before a token is there, and that it has ended after the last."""
    outcome = load(
        [event(role="assistant", content=""), 0.3, event(content="a"), 0.1, event(content="b"), event("stop"), "[DONE]"]
    )
    assert outcome.error is None and outcome.completion_tokens == 2
    assert outcome.first_token is not None and 0.3 <= outcome.first_token < outcome.seconds
    assert len(outcome.gaps) == 1 and outcome.gaps[0] >= 0.1


def test_an_answer_without_text_has_an_end() -> None:
    outcome = load([event(role="assistant"), 0.1, event("stop"), "[DONE]"])
    assert outcome.error is None and outcome.first_token is not None and outcome.first_token >= 0.1
    assert outcome.gaps == []


@pytest.mark.parametrize("odd", ["{", "[]", '{"choices": [3]}', '{"usage": {"tokens": 3}}'])
def test_events_that_are_none_are_a_failed_request(odd: str) -> None:
    assert load([event(content="a"), odd]).error is not None


@pytest.mark.parametrize("odd", ["{", "[]", '{"id": 1}', '{"choices": [3]}'])
def test_events_that_are_none_end_a_chat_in_a_sentence(odd: str) -> None:
    with foreign(b"", [event(content="a"), odd]) as url:
        conversation = Conversation(Endpoint(url), "m")
        with pytest.raises(MeswitchError, match="is a server running there"):
            list(conversation.ask("hello"))
        assert conversation.messages == []


@pytest.mark.parametrize("models", [b"<html>", b"[]", b'{"data": [{}]}', b'{"data": null}', b"{}", b"\xff"])
def test_what_is_no_list_of_models_is_refused(models: bytes) -> None:
    with foreign(models) as url, pytest.raises(MeswitchError, match="no OpenAI-compatible server"):
        Endpoint(url).models()


@pytest.mark.parametrize(
    "url", ["http://[", "ftp://x", "127.0.0.1:8000", "http://", "http://x:99999", "http://x:y", ""]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="--url"):
        Endpoint(url)


def test_addresses_with_and_without_a_version(running: Any) -> None:
    answers: list[Callable[[], Any]] = [Endpoint(running.url + end).models for end in ("", "/", "/v1", "/v1/")]
    assert len({json.dumps(answer()) for answer in answers}) == 1


def test_prompts_are_read_from_lines_of_json(tmp_path: Path) -> None:
    """JSON strings may hold characters that end a line elsewhere."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n\n{"text": "three"}\n', "utf-8")
    assert read_prompts(path) == ["one\u2028two", "three"]
    for line, complaint in (("7", 'line 2: needs "prompt" or "text"'), ("{", "line 2: not JSON")):
        path.write_text('{"prompt": "one"}\n' + line)
        with pytest.raises(UsageError, match=complaint):
            read_prompts(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="no line with data"):
        read_prompts(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
