"""Our server over vLLM: a chat, a stream, an administrator, and clients that go away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family
from engine.vllm.conftest import NEEDS_VLLM, make_engine
from server.family import Running, serve_engine
from server.tool_templates import HERMES

from meswitch_cli.engine.contract import BASE
from meswitch_cli.server.settings import ServerSettings

pytestmark = NEEDS_VLLM
TOKENS = 12


@pytest.fixture(scope="module")
def running(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("admin")
    settings = ServerSettings(admin_keys=("administrator",), experts_dir=folder)
    server = serve_engine(make_engine(family, slots=2, max_wait=0.1), settings)
    yield server
    server.stop()


def wanted(running: Running, family: Family, name: str, text: str) -> list[int]:
    """The plain model's answer to a chat in its own template."""
    tokenizer = running.service.engine.tokenizer(name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.inference_mode():
        out = family.references[name].generate(
            prompt, max_new_tokens=TOKENS, do_sample=False, eos_token_id=1, pad_token_id=0
        )
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    return tokens


def chat(running: Running, name: str, text: str, stream: bool) -> list[int]:
    body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0}
    response = running.post("/v1/chat/completions", body | {"stream": stream, "return_token_ids": True})
    assert response.status_code == 200, response.text
    if not stream:
        return list(response.json()["choices"][0]["token_ids"])
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]


def test_chats_and_streams_of_everyone_at_once(running: Running, family: Family) -> None:
    cases = [(name, f"say {index}", index % 2 == 0) for name in (BASE, *family.artifacts) for index in range(4)]
    with ThreadPoolExecutor(len(cases)) as pool:
        told = list(pool.map(lambda case: chat(running, *case), cases))
    assert told == [wanted(running, family, name, text) for name, text, _ in cases]
    metrics = running.get("/metrics").text
    assert "meswitch" in metrics and running.get("/ready").status_code == 200
    models = {item["id"]: item for item in running.get("/v1/models").json()["data"]}
    assert set(models) == {BASE, *family.artifacts}


def test_what_vllm_cannot_do_is_a_400_that_names_it(running: Running) -> None:
    body: dict[str, Any] = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "temperature": 0.005}
    response = running.post("/v1/chat/completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "temperature"


def test_tools_are_called_under_a_grammar(running: Running) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "w", "parameters": parameters | {"additionalProperties": False}}}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "max_tokens": 120}
    for name in (BASE, "alpha"):
        tokenizer = running.service.engine.tokenizer(name)
        before, tokenizer.chat_template = tokenizer.chat_template, HERMES
        try:
            asked = body | {"model": name, "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
            response = running.post("/v1/chat/completions", asked)
        finally:
            tokenizer.chat_template = before
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "w"
        assert json.loads(call["function"]["arguments"])["city"] in ("Bonn", "Rome")


def test_a_prompts_own_log_probabilities_are_refused_by_name(running: Running) -> None:
    body = {"model": "alpha", "prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 1}
    response = running.post("/v1/completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "echo"


def test_experts_come_and_go(running: Running, family: Family, tmp_path: Path) -> None:
    import shutil

    folder = running.service.settings.experts_dir
    assert folder is not None
    shutil.copytree(family.artifacts["beta"], folder / "another")
    key = {"authorization": "Bearer administrator"}
    loaded = running.post("/v1/experts/load", {"name": "another", "path": "another"}, headers=key)
    assert loaded.status_code == 200, loaded.text
    assert chat(running, "another", "hello", False) == wanted(running, family, "beta", "hello")
    assert running.post("/v1/experts/pin", {"name": "another"}, headers=key).status_code == 200
    assert running.post("/v1/experts/pin", {"name": "another", "pinned": False}, headers=key).status_code == 200
    assert running.post("/v1/experts/unload", {"name": "another"}, headers=key).status_code == 200
    body = {"model": "another", "messages": [{"role": "user", "content": "x"}]}
    assert running.post("/v1/chat/completions", body).status_code == 404
