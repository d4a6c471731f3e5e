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

from meswitch_cli.app import main
from meswitch_cli.client import Endpoint, make_workload, run_load
from meswitch_cli.client.client import Outcome
from meswitch_cli.client.conversation import Conversation
from meswitch_cli.client.workload import read_prompts
from meswitch_cli.errors import MeswitchError, UsageError

#: What an answer's stream is made of: pauses in seconds, events, lines of data, or bytes as they are.
Script = Sequence[float | str | bytes | dict[str, Any]]


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
                elif isinstance(item, bytes):
                    self.wfile.write(item)
                else:
                    data = item if isinstance(item, str) else json.dumps(item)
                    self.wfile.write(f"data: {data}\n\n".encode())

        def _begin(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing is written to stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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
    # The reader may be late for the first token, never early for the second.
    assert len(outcome.gaps) == 1 and outcome.first_token + outcome.gaps[0] >= 0.4


def test_an_answer_without_text_has_an_end() -> None:
    outcome = load([event(role="assistant"), 0.1, event("stop"), "[DONE]"])
    assert outcome.error is None and outcome.first_token is not None and outcome.first_token >= 0.1
    assert outcome.gaps == []


def chatted(script: Script) -> str:
    with foreign(b"", script) as url:
        return "".join(piece.text for piece in Conversation(Endpoint(url), "m").ask("hello"))


def raw(*events: dict[str, Any] | str, form: str = "data: {}\n\n", mark: bytes = b"") -> list[bytes]:
    """Events in a form of their own, each sent by itself."""
    said = [item if isinstance(item, str) else json.dumps(item, separators=(",", ":")) for item in events]
    return [mark, *(form.format(item).encode() for item in said)]


WHOLE = (event(role="assistant"), event(content="a b"), event(content="c"), event("stop"), "[DONE]")
NO_DELTA = {"model": "m", "choices": [{"index": 0, "delta": None, "finish_reason": None}], "usage": None, "error": None}
ENDED = {"model": None, "choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]}
USAGE = {"model": "m", "choices": None, "usage": {"prompt_tokens": 3, "completion_tokens": 7}}


@pytest.mark.parametrize(
    ("script", "text", "tokens"),
    [
        (raw(*WHOLE), "a bc", 2),
        (raw(*WHOLE, form="data:{}\n\n"), "a bc", 2),
        (raw(*WHOLE, form="data: {}\r\n\r\n"), "a bc", 2),
        (raw(*WHOLE, form="data:{}\r\r"), "a bc", 2),
        (raw(*WHOLE, form=": still here\nid: 1\nevent: message\ndata: {}\n\n"), "a bc", 2),
        (raw(*WHOLE, form="event: ping\ndata: ping\n\ndata:\n\ndata: {}\n\n", mark=b"\xef\xbb\xbf"), "a bc", 2),
        (raw(NO_DELTA, *WHOLE[:3], NO_DELTA, ENDED, "[DONE]"), "a bc", 2),
        (raw(*WHOLE[:3], ENDED, USAGE), "a bc", 7),
        (raw({"choices": None}, {"choices": [], "prompt_filter_results": []}, *WHOLE), "a bc", 2),
        (raw(*WHOLE[:3], "[DONE]"), "a bc", 2),
        ([b'data: {"choices":\ndata: [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'], "a", 1),
        (['{"choices": [{"delta": {"content": "x\u2028y\u0085z"}, "finish_reason": "stop"}]}'], "x\u2028y\u0085z", 1),
        (raw(event(content=[{"type": "text", "text": "a"}, {"type": "text", "text": None}]), ENDED), "a", 1),
        (raw(event(reasoning_content="hm"), event(reasoning="hm"), event(content="a"), ENDED), "a", 3),
    ],
)
def test_every_legal_stream_is_read(script: Script, text: str, tokens: int) -> None:
    outcome = load(script)
    assert (outcome.error, outcome.completion_tokens) == (None, tokens)
    assert chatted(script) == text


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (raw(*WHOLE[:3]), "the stream ended before the answer did"),
        ([b'{"choices": [{"message": {"content": "a"}}]}'], "the server does not stream"),
        ([], "the server does not stream"),
        (raw(event(content="a"), {"error": {"message": "out of memory"}}), "out of memory"),
        (raw(event(content="a"), {"error": "out of memory"}), "out of memory"),
        ([*raw(event(content="a")), b'event: error\ndata: {"error": {"code": 5, "message": null}}\n\n'], "'code': 5"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(script: Script, said: str) -> None:
    assert said in str(load(script).error)
    with foreign(b"", script) as url:
        conversation = Conversation(Endpoint(url), "m")
        with pytest.raises(MeswitchError, match=said):
            list(conversation.ask("hello"))
        assert conversation.messages == []


def test_a_run_that_measured_nothing_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with foreign(b"", raw(event(role="assistant"), "[DONE]")) as url:
        words = ["meswitch", "bench", "--url", url, "--model", "m", "--requests", "2", "--concurrency", "1", "--json"]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
    told = capsys.readouterr()
    assert ended.value.code == 1 and "nothing was measured" in told.err
    assert json.loads(told.out)["completion_tokens"] == 0


DEAD = "http://127.0.0.1:9"
PROXIES = [
    {"HTTP_PROXY": DEAD, "http_proxy": DEAD},
    {"ALL_PROXY": DEAD, "all_proxy": DEAD},
    {"ALL_PROXY": "socks5://127.0.0.1:9", "HTTPS_PROXY": "socks5://127.0.0.1:9"},
    {"HTTP_PROXY": "nonsense://x", "http_proxy": "nonsense://x"},
]


@pytest.mark.parametrize("proxies", PROXIES, ids=str)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0.0.0.0", "LocalHost"])
def test_no_proxy_stands_before_this_machine(
    monkeypatch: pytest.MonkeyPatch, proxies: dict[str, str], host: str
) -> None:
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with foreign(b'{"data": [{"id": "m"}]}', raw(*WHOLE)) as url:
        endpoint = Endpoint(url.replace("127.0.0.1", host))
        assert endpoint.experts() == ["m"]
        assert "".join(piece.text for piece in Conversation(endpoint, "m").ask("hello")) == "a bc"
        (outcome,) = asyncio.run(run_load(endpoint, make_workload(["m"], requests=1, concurrency=1, max_tokens=4)))
    assert outcome.error is None


def test_a_proxy_before_another_machine_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with foreign(b'{"data": [{"id": "far"}]}') as proxy:  # it answers whatever it is asked to fetch
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        assert Endpoint("http://models.example").experts() == ["far"]
    with pytest.raises(MeswitchError, match="the proxy that HTTP_PROXY names"):
        Endpoint("http://models.example").models()
    monkeypatch.setenv("http_proxy", "nonsense://x")
    with pytest.raises(MeswitchError, match="the proxy that HTTP_PROXY names cannot be used"):
        Endpoint("http://models.example").models()


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
    ends = ("", "/", "/v1", "/v1/", "/v1/chat/completions")
    answers: list[Callable[[], Any]] = [Endpoint(running.url + end).models for end in ends]
    assert len({json.dumps(answer()) for answer in answers}) == 1


def test_prompts_are_read_from_lines_of_json(tmp_path: Path) -> None:
    """JSON strings may hold characters that end a line elsewhere."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n\n{"text": "three"}\n', "utf-8")
    assert read_prompts(path) == ["one\u2028two", "three"]
    complaints = {
        "7": "line 2: not a JSON object",
        '{"other": 1}': 'line 2: needs "prompt" or "text"',
        "{": "line 2: not JSON",
    }
    for line, complaint in complaints.items():
        path.write_text('{"prompt": "one"}\n' + line)
        with pytest.raises(UsageError, match=complaint):
            read_prompts(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="no line with data"):
        read_prompts(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
