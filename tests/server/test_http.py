"""What belongs to HTTP rather than to an API: HEAD, and streams that nothing is sent on for a while."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from server.family import Running

from meswitch_cli.client.answers import AnswerDecoder
from meswitch_cli.server.streaming import KEEP_ALIVE, EventStream

CHAT = {"model": "red", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/red"])
def test_head_is_get_without_its_body(running: Running, path: str) -> None:
    head, get = running.request("HEAD", path), running.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/metrics", "/v1/models", "/v1/models/red"):  # whose length changes from moment to moment
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_is_not_there(running: Running) -> None:
    assert running.request("HEAD", "/v2/nothing").status_code == 404
    assert running.request("HEAD", "/v1/chat/completions").status_code == 405


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to what would be waited for next: its tests take no time and know no busy machine."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select

        def jump(timeout: float | None = None) -> Any:
            self._now += timeout or 0.0
            return select(None if timeout is None else 0)

        self._selector.select = jump

    def time(self) -> float:
        return self._now


def stream(events: AsyncIterator[Any], keep_alive: float) -> list[bytes]:
    """What a client is sent."""
    sent: list[bytes] = []

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(600)
        return {"type": "http.disconnect"}

    async def run() -> None:
        response: Any = EventStream(events, lambda: None, keep_alive)
        await response({"type": "http"}, receive, send)

    loop = VirtualTime()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return sent


def test_a_stream_that_waits_is_kept_alive() -> None:
    async def late() -> AsyncIterator[Any]:
        for text in ("a", "b"):
            await asyncio.sleep(4.5)
            yield {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}

    sent = stream(late(), 1.0)
    first = next(index for index, data in enumerate(sent) if data.startswith(b"data: {"))
    assert first == 4 and set(sent[:first]) == {KEEP_ALIVE}
    assert sent[-1] == b"data: [DONE]\n\n" and sent[first:].count(KEEP_ALIVE) == 4
    decoder = AnswerDecoder()
    assert "".join(progress.text for data in sent for progress in decoder.push(data)) == "ab"


def test_a_stream_that_goes_on_gets_no_comments() -> None:
    async def steady() -> AsyncIterator[Any]:
        for _ in range(20):
            await asyncio.sleep(0.9)
            yield {"choices": []}

    assert KEEP_ALIVE not in stream(steady(), 1.0)


def test_usage_so_far(running: Running) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    text = running.post("/v1/chat/completions", CHAT | options | {"ignore_eos": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5, 6, 6]
    assert events[-1]["choices"] == []


def test_an_answer_goes_on_with_what_was_begun(running: Running) -> None:
    begun = [*CHAT["messages"], {"role": "assistant", "content": "Once"}]  # type: ignore[misc]
    body = CHAT | {"messages": begun, "return_token_ids": True, "continue_final_message": True}
    continued = running.post("/v1/chat/completions", body | {"add_generation_prompt": False})
    assert continued.status_code == 200, continued.text
    # What the template writes up to there, and nothing behind it.
    prompt = running.post("/tokenize", {"model": "red", "messages": CHAT["messages"]}).json()["tokens"]
    once = running.post("/tokenize", {"model": "red", "prompt": "Once"}).json()["tokens"]
    plain = {"model": "red", "prompt": [*prompt, *once], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    same = running.post("/v1/completions", plain).json()
    assert continued.json()["choices"][0]["token_ids"] == same["choices"][0]["token_ids"]
    assert continued.json()["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
    both = running.post("/v1/chat/completions", body | {"add_generation_prompt": True})
    assert both.json()["error"]["param"] == "continue_final_message"


def test_a_models_own_sampling_is_the_default(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.service.engine
    seen: list[Any] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, told: (seen.append(request.sampling), submit(request, told)))
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    monkeypatch.setattr(engine, "sampling_defaults", lambda expert: defaults if expert == "red" else {})
    plain = {key: value for key, value in CHAT.items() if key != "temperature"}
    running.post("/v1/chat/completions", plain)
    running.post("/v1/completions", {"model": "red", "prompt": "x", "max_tokens": 2, "top_k": 5})
    running.post("/v1/chat/completions", plain | {"temperature": 0, "top_p": None})
    running.post("/v1/chat/completions", plain | {"model": "blue"})
    told = [(sampling.temperature, sampling.top_p, sampling.top_k) for sampling in seen]
    assert told == [(0.6, 0.9, 20), (0.6, 0.9, 5), (0, 0.9, 20), (1, 1, 0)]
    models = {model["id"]: model for model in running.get("/v1/models").json()["data"]}
    assert (models["red"]["sampling"], models["blue"]["sampling"]) == (defaults, {})
