"""Thousands of small requests of every kind against a real `meswitch serve`: nothing leaks, no token is wrong.

python tests bench soak --requests 5000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil
from patience import PATIENCE
from server.family import Family, make_family

CONCURRENCY = 16
MODELS = ("base", "red", "green", "blue")
WORDS = ("one", "two", "three", "four", "five", "six")
KINDS = ("whole", "stream", "vanish", "sample", "schema", "refused")
WEIGHTS = (6, 6, 3, 3, 1, 1)
MORE_HANDLES = 2
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def soak(family: Family, requests: int, warm_up: int) -> dict[str, Any]:
    """Serve the family with two slots for three experts, send `warm_up` requests, then `requests` more.

    Returns:
        Memory and file handles of the server after each of the two, what is still held, and wrong answers.
    """
    experts = [f"--expert={name}={path}" for name, path in family.artifacts.items()]
    options = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--slots", "2", "--cache-tokens", "8192"]
    command = [sys.executable, "-m", "meswitch_cli", "serve", "--base", str(family.base), *experts, *options]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, "--log-level", "warning"], stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            address = _address(server, log)
            process = psutil.Process(server.pid)
            wanted = _greedy(address)
            before = _held(address, process, _send(address, wanted, warm_up, seed=0))
            started = time.perf_counter()
            after = _held(
                address, process, _send(address, wanted, requests, seed=1), before["file_handles"] + MORE_HANDLES
            )
            seconds = time.perf_counter() - started
        finally:
            server.terminate()
            server.wait(PATIENCE)
    return {"requests": requests, "seconds": round(seconds, 1), "before": before, "after": after}


def _address(server: subprocess.Popen[bytes], log: Any) -> str:
    for _ in range(round(10 * PATIENCE)):
        log.seek(0)
        if found := re.search(r"^page\s+(\S+)/$", log.read(), re.MULTILINE):
            return found[1]
        if server.poll() is not None:
            break
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"the server did not start:\n{log.read()}")


def _body(model: str, word: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": f"count {word}", "max_tokens": 8, "temperature": 0} | more


def _greedy(address: str) -> dict[tuple[str, str], str]:
    def text(model: str, word: str) -> str:
        answer = httpx2.post(f"{address}/v1/completions", json=_body(model, word), timeout=PATIENCE)
        return str(answer.json()["choices"][0]["text"])

    return {(model, word): text(model, word) for model in MODELS for word in WORDS}


def _send(address: str, wanted: dict[tuple[str, str], str], count: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    plan = [(rng.choices(KINDS, WEIGHTS)[0], rng.choice(MODELS), rng.choice(WORDS)) for _ in range(count)]
    results: Counter[str] = Counter()
    todo = iter(plan)

    async def work(client: httpx2.AsyncClient) -> None:
        for kind, model, word in todo:
            right = await _one(client, kind, model, word, wanted[model, word])
            results[f"{kind} {'right' if right else 'wrong'}"] += 1

    async def everything() -> None:
        async with httpx2.AsyncClient(base_url=address, timeout=PATIENCE) as client:
            await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))

    asyncio.run(everything())
    return results


async def _one(client: httpx2.AsyncClient, kind: str, model: str, word: str, wanted: str) -> bool:
    path = "/v1/completions"
    if kind == "whole":
        response = await client.post(path, json=_body(model, word))
        return bool(response.json()["choices"][0]["text"] == wanted)
    if kind == "sample":
        response = await client.post(path, json=_body(model, word, temperature=1, n=2, logprobs=2))
        return len(response.json()["choices"]) == 2
    if kind == "schema":
        wish = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        messages = [{"role": "user", "content": word}]
        body = {"model": model, "messages": messages, "response_format": wish, "max_tokens": 60, "temperature": 0.5}
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        return choice["finish_reason"] == "length" or set(json.loads(choice["message"]["content"])) == {"ok"}
    if kind == "refused":
        return (await client.post(path, json=_body(model, word, nonsense=1))).status_code == 400
    longer = {"max_tokens": 300, "ignore_eos": True} if kind == "vanish" else {}
    text = ""
    async with client.stream("POST", path, json=_body(model, word, stream=True, **longer)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if kind == "vanish":
                    return wanted.startswith(text[: len(wanted)])
    return text == wanted


def _held(
    address: str, process: psutil.Process, results: Counter[str], handles: float = float("inf")
) -> dict[str, Any]:
    """What the server holds once nothing runs and closed connections are closed, so that few handles are left."""
    deadline = time.monotonic() + PATIENCE
    while True:
        status = httpx2.get(f"{address}/v1/status", timeout=PATIENCE).json()
        engine = status["engine"]
        busy = engine["running"] + engine["waiting"] + engine["cache_blocks_used"]
        if (not busy and process.num_fds() <= handles) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return {
        "memory_mb": round(process.memory_info().rss / 1e6, 1),
        "file_handles": process.num_fds(),
        "threads": process.num_threads(),
        "running": engine["running"],
        "waiting": engine["waiting"],
        "cache_blocks_used": engine["cache_blocks_used"],
        "expert_requests": sum(expert["running"] + expert["waiting"] for expert in status["experts"]),
        "evictions": engine["slot_evictions"],
        "results": dict(sorted(results.items())),
    }


def leaks(result: dict[str, Any], memory_mb: float) -> list[str]:
    """What was not given back, or was wrong; `memory_mb` is how much memory may have grown."""
    before, after = result["before"], result["after"]
    found = [
        f"{name}: {after[name]}"
        for name in ("running", "waiting", "cache_blocks_used", "expert_requests")
        if after[name]
    ]
    found += [f"{kind}: {count}" for kind, count in after["results"].items() if kind.endswith("wrong")]
    # asyncio's pool of threads grows whenever more requests meet than before.
    for name, more in (("file_handles", MORE_HANDLES), ("threads", 4 + (os.cpu_count() or 1))):
        if after[name] > before[name] + more:
            found.append(f"{name}: {before[name]} -> {after[name]}")
    if after["memory_mb"] > before["memory_mb"] + memory_mb:
        found.append(f"memory: {before['memory_mb']} -> {after['memory_mb']} MB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(make_family(Path(folder)), arguments.requests, warm_up=500)
    print(json.dumps(result, indent=1))
    if found := leaks(result, memory_mb=20):
        sys.exit("leaks: " + "; ".join(found))


if __name__ == "__main__":
    main()
