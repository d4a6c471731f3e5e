"""What goes wrong in the field: clients that vanish, full queues, signals, experts that change under load."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from engine.held import held
from patience import PATIENCE, until
from server.family import Family, Running, Start
from server.fields import prompts

from meswitch_cli.server.settings import ServerSettings

ADMIN = {"authorization": "Bearer root"}


def long_chat(model: str = "red", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "go on"}], "max_tokens": 480}
    return body | {"ignore_eos": True, "temperature": 0} | more


def wait_until_idle(server: Running) -> None:
    """Until nothing runs or waits and no cache block is held."""

    def held() -> tuple[int, int, int]:
        numbers = server.service.engine.statistics()
        return numbers.running, numbers.waiting, numbers.cache_blocks_used

    until(lambda: held() == (0, 0, 0), held)


@contextmanager
def streaming(server: Running, **more: Any) -> Iterator[Iterator[str]]:
    """A long answer that has begun: what follows its first line."""
    body = long_chat(stream=True, **more)
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def test_two_hundred_clients_vanish(start_server: Start) -> None:
    """Half in the middle of a stream, half while they wait for a whole answer: all is freed, the rest are right."""
    server = start_server(max_queue=512)
    wanted = server.post("/v1/chat/completions", long_chat(max_tokens=20)).json()["choices"][0]["message"]["content"]

    async def vanish(client: httpx2.AsyncClient, index: int) -> None:
        body = long_chat(("red", "green", "blue", "base")[index % 4], stream=index % 2 == 0)
        try:
            async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=2) as response:
                async for _ in response.aiter_lines():
                    return
        except httpx2.TimeoutException:
            return

    async def everybody() -> None:
        async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None)) as client:
            await asyncio.gather(*(vanish(client, index) for index in range(200)))

    asyncio.run(everybody())
    wait_until_idle(server)
    after = server.post("/v1/chat/completions", long_chat(max_tokens=20)).json()
    assert after["choices"][0]["message"]["content"] == wanted
    gone = [line for line in server.get("/metrics").text.splitlines() if 'status="499"' in line]
    assert gone


def test_a_full_queue_turns_away_with_a_time_to_come_back(start_server: Start) -> None:
    server = start_server(max_running=1, max_queue=2)
    with ThreadPoolExecutor(12) as pool, held(server.service.engine) as release:
        asked = [pool.submit(server.post, "/v1/chat/completions", long_chat(max_tokens=60)) for _ in range(12)]
        until(lambda: sum(answer.done() for answer in asked) == 9)  # all but the one that runs and the two that wait
        release()
        answers = [answer.result() for answer in asked]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3
    full = next(answer for answer in answers if answer.status_code == 503)
    assert full.headers["retry-after"] == "1" and full.json()["error"]["code"] == "queue_full"
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200}
    assert len(texts) == 1
    wait_until_idle(server)


def test_choices_are_queued_all_or_not_at_all(start_server: Start) -> None:
    """Those that do not fit now are turned away and leave no trace; those that never could are refused."""
    server = start_server(max_running=1, max_queue=2)
    never = server.post("/v1/chat/completions", long_chat(n=4))
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    prompts_ = server.post("/v1/completions", {"model": "red", "prompt": ["a"] * 4, "max_tokens": 1})
    assert (prompts_.status_code, prompts_.json()["error"]["param"]) == (400, "prompt")
    with held(server.service.engine, after=2) as release, streaming(server) as lines:
        for _ in range(3):  # the two that were queued for a moment are gone at once, and in nobody's way
            assert server.post("/v1/chat/completions", long_chat(n=3)).status_code == 503
            assert server.service.engine.statistics().waiting == 0
        release()
        assert server.post("/v1/chat/completions", long_chat(n=2, max_tokens=2)).status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    wait_until_idle(server)


def test_a_drain_lets_the_running_end_and_turns_the_new_away(start_server: Start) -> None:
    server = start_server()
    with held(server.service.engine, after=2) as release, streaming(server, max_tokens=100) as lines:
        server.server.begin_drain()
        assert server.get("/health").status_code == 200
        ready = server.get("/ready")
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "shutting_down"
        refused = server.post("/v1/chat/completions", long_chat())
        assert refused.status_code == 503 and "retry-after" in refused.headers
        release()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    server.thread.join(PATIENCE)
    assert not server.thread.is_alive()


def test_a_drain_has_an_end(start_server: Start) -> None:
    server = start_server(settings=ServerSettings(drain_seconds=0.1))
    with held(server.service.engine, after=2), streaming(server, n=16) as lines:
        server.server.begin_drain()
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert rest[-1] == "data: [DONE]"
    server.thread.join(PATIENCE)
    assert not server.thread.is_alive()


def admin_server(start_server: Start, experts_dir: Path, names: tuple[str, ...], **engine: Any) -> Running:
    settings = ServerSettings(admin_keys=("root",), experts_dir=experts_dir)
    server = start_server(settings=settings, experts={name: experts_dir / name for name in names}, **engine)
    server.headers = ADMIN
    return server


def test_experts_come_and_go_under_load(start_server: Start, experts_dir: Path) -> None:
    """Load, pin and unload blue over and over; red and the base go on, and no token of anybody is wrong."""
    server = admin_server(start_server, experts_dir, ("red", "green", "blue"), slots=2)
    body = {name: long_chat(name, max_tokens=10) for name in ("red", "base", "blue")}
    right = {name: server.post("/v1/chat/completions", body[name]).json()["choices"][0]["message"] for name in body}
    ended, wrong, answered = threading.Event(), [], dict.fromkeys(body, 0)

    def ask(name: str) -> None:
        while not ended.is_set():
            response = server.post("/v1/chat/completions", body[name])
            if response.status_code == 200:
                answered[name] += 1
                if response.json()["choices"][0]["message"] != right[name]:
                    wrong.append(name)
            elif not (name == "blue" and response.status_code == 404):
                wrong.append(response.text)

    asking = [threading.Thread(target=ask, args=(name,)) for name in body for _ in range(2)]
    for thread in asking:
        thread.start()
    for _ in range(3):
        assert server.post("/v1/experts/unload", {"name": "blue"}).json()["unloaded"] is True
        assert "blue" not in {model["id"] for model in server.get("/v1/models").json()["data"]}
        loaded = server.post("/v1/experts/load", {"name": "blue"})
        assert loaded.status_code == 200, loaded.text
        assert server.post("/v1/experts/pin", {"name": "red"}).json()["pinned"] is True
        assert server.post("/v1/experts/pin", {"name": "red", "pinned": False}).json()["pinned"] is False
    until(lambda: all(answered.values()) or wrong, lambda: answered)
    ended.set()
    for thread in asking:
        thread.join(PATIENCE)
    assert wrong == [] and all(answered.values()), answered
    wait_until_idle(server)


def test_the_name_of_other_weights_does_not_bring_back_the_old(start_server: Start, experts_dir: Path) -> None:
    server = admin_server(start_server, experts_dir, ("red", "green"))
    blue_as_red = long_chat("red", max_tokens=12)
    before = server.post("/v1/chat/completions", blue_as_red).json()
    server.post("/v1/experts/unload", {"name": "red"})
    assert server.post("/v1/experts/load", {"name": "red", "path": "blue"}).status_code == 200
    after = server.post("/v1/chat/completions", blue_as_red).json()
    assert after["choices"][0]["message"] != before["choices"][0]["message"]
    assert after["system_fingerprint"] != before["system_fingerprint"]


def test_vllms_names_load_and_unload(start_server: Start, experts_dir: Path) -> None:
    server = admin_server(start_server, experts_dir, ("red", "green"))
    added = server.post("/v1/load_lora_adapter", {"lora_name": "sea", "lora_path": "blue", "lora_int_id": None})
    assert (added.status_code, added.text) == (200, "Success: LoRA adapter 'sea' added successfully.")
    absolute = str(experts_dir / "blue")
    assert server.post("/v1/load_lora_adapter", {"lora_name": "lake", "lora_path": absolute}).status_code == 200
    assert {"sea", "lake"} <= {model["id"] for model in server.get("/v1/models").json()["data"]}
    assert server.post("/v1/chat/completions", long_chat("sea", max_tokens=2)).status_code == 200
    gone = server.post("/v1/unload_lora_adapter", {"lora_name": "sea", "lora_int_id": 7})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sea' removed successfully.")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "sea"}).status_code == 404
    assert server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}).status_code == 400
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert server.post(path, {"lora_name": "lake", "lora_path": "blue"}, headers={}).status_code == 401


#: Requests to load, and what becomes of them: status and the parameter at fault.
REFUSED_LOADS = [
    ({"name": "x", "path": "../.."}, 400, "path"),
    ({"name": "x", "path": "/etc"}, 400, "path"),
    ({"name": "x", "path": "."}, 400, "path"),
    ({"name": "x", "path": "outside"}, 400, "path"),
    ({"name": "x", "path": "red\0"}, 400, "path"),
    ({"name": "x", "path": "x" * 1000}, 400, "path"),
    ({"name": "x", "path": "nowhere"}, 404, "path"),
    ({"name": "x", "path": "broken"}, 400, "path"),
    ({"name": "auto", "path": "red"}, 400, "name"),
    ({"name": "a b", "path": "red"}, 400, "name"),
    ({"name": "red"}, 409, "name"),
]


def test_what_may_not_be_loaded(start_server: Start, experts_dir: Path, family: Family) -> None:
    (experts_dir / "outside").symlink_to(family.artifacts["blue"])  # a link that leads out of the folder
    (experts_dir / "blue").rename(experts_dir / "broken")
    shard = next((experts_dir / "broken").glob("delta-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0xFF
    shard.write_bytes(data)
    server = admin_server(start_server, experts_dir, ("red", "green"))
    for body, status, parameter in REFUSED_LOADS:
        response = server.post("/v1/experts/load", body)
        assert response.status_code == status, (body, response.text)
        assert response.json()["error"]["param"] == parameter
        assert "Traceback" not in response.text
    for name in ("red", "green", "base"):
        assert server.post("/v1/chat/completions", long_chat(name, max_tokens=2)).status_code == 200
    assert server.post("/v1/experts/unload", {"name": "violet"}).status_code == 404
    assert server.post("/v1/experts/unload", {"name": "base"}).status_code == 400
    assert server.post("/v1/experts/pin", {"name": "violet"}).status_code == 404


def test_a_server_whose_engine_has_failed_is_neither_ready_nor_healthy(start_server: Start) -> None:
    server = start_server()
    assert server.get("/health").status_code == server.get("/ready").status_code == 200

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of everything")

    server.service.engine._base.model.forward = fail
    lost = server.post("/v1/chat/completions", long_chat())
    assert (lost.status_code, lost.json()["error"]["code"]) == (500, "generation_failed")
    for path in ("/health", "/ready"):
        told = server.get(path)
        assert (told.status_code, told.json()["error"]["code"]) == (503, "engine_failed")
        assert "out of everything" in told.json()["error"]["message"]
    assert server.post("/v1/chat/completions", long_chat()).status_code == 503


def test_an_expert_that_leaves_is_routed_to_no_more(start_server: Start, router: Any) -> None:
    """While its last requests run, it is served no longer: auto falls back, its name is unknown."""
    server = start_server(router=router)
    with held(server.service.engine, after=2) as release, streaming(server) as lines:
        leaving = threading.Thread(target=server.service.engine.unload_expert, args=("red",))
        leaving.start()
        until(lambda: "red" not in {model["id"] for model in server.get("/v1/models").json()["data"]})
        named = server.post("/v1/chat/completions", long_chat(max_tokens=2))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.post, "/v1/chat/completions", long_chat("auto", max_tokens=2) | red_prompt())
            until(lambda: asked.done() or server.service.engine.statistics().running == 2)
            still_leaving = leaving.is_alive()
            release()
            routed = asked.result()
        rest = [line for line in lines if line]
    assert still_leaving and rest[-1] == "data: [DONE]"
    assert (routed.status_code, routed.headers["x-meswitch-reason"]) == (200, "unavailable"), routed.text
    assert named.status_code == 404
    leaving.join(PATIENCE)
    assert not leaving.is_alive()


def red_prompt() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompts("red", 9)[7]}]}


def test_experts_are_not_changed_while_the_server_goes_down(start_server: Start, experts_dir: Path) -> None:
    server = admin_server(start_server, experts_dir, ("red", "green"))
    with held(server.service.engine, after=2) as release, streaming(server) as lines:
        server.server.begin_drain()
        until(lambda: server.service.engine.closed)
        for what, body in (("load", {"name": "blue"}), ("unload", {"name": "green"}), ("pin", {"name": "green"})):
            refused = server.post(f"/v1/experts/{what}", body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down"), what
            assert "retry-after" in refused.headers
        release()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_cached_tokens_are_counted_once_a_prompt(start_server: Start) -> None:
    server = start_server(page_size=8)
    body = long_chat(max_tokens=2, n=4) | {"messages": [{"role": "user", "content": "say it again " * 12}]}
    server.post("/v1/chat/completions", body)
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] - 9 <= cached < usage["prompt_tokens"]
